"""Updates of one model in one process and in several: gradients, figures, weights."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from fakes import FakePolicy
from judging import PAIRWISE, A, B, single_turn
from tiny import tiny_config
from torch import Tensor

from dwrl_fast.config import TrainConfig
from dwrl_fast.data import read_preferences
from dwrl_fast.encode import Group
from dwrl_fast.methods import METHODS
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.scoring import runtime
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.policy import Policy

WORDS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


def says(text: str, i: int) -> str:
    """A thought of two to six tokens that depends on its context. Some are cut; thoughts about two responses end with a
    verdict.
    """
    place = sum(map(ord, text)) + 7 * i
    verdict = f" {(A, B)[place % 2]}" if "compare" in text else ""
    return " ".join(WORDS[(place * k) % 10] for k in range(1, 2 + place % 4)) + (verdict or " cut" * (place % 5 == 0))


def gradients(policy: Policy, method: Any, minibatch: Any, phase: str) -> dict[str, Tensor]:
    """The gradients of an update before clipping; no step is taken."""
    found: dict[str, Tensor] = {}

    class Read(Optimizers):
        def clip(self) -> Tensor:
            for name, p in self.named.items():
                assert p.grad is not None, name
                whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                found[name] = whole.clone()
            return super().clip()

        def step(self, phase: str, minibatch: int, used: float = 0.0) -> None:
            for p in self.named.values():
                p.grad = None

    before = policy.optimizers
    policy.optimizers = Read(policy.model, method, before.config, 1)
    policy.update(phase, minibatch, method.loss, 0)
    policy.optimizers = before
    return found


def updated(ranks: Ranks, config: TrainConfig, steps: int) -> dict[str, Any]:
    """Gradients of every phase's first update, the figures, and the weights after `steps` rollout batches."""
    pairwise = METHODS[config.method].template == "pairwise"
    thinks = None if config.method in ("bt", "dpo") else says
    policy_of = FakePolicy(config, single_turn(PAIRWISE) if pairwise else None, thinks, ranks)
    method = policy_of.method
    rows = read_preferences(str(config.dataset_name)).rows
    optimizers = Optimizers(policy_of.model, method, config, total=100)
    policy = Policy(policy_of.runtime, optimizers)
    policy.model.train()
    if config.gradient_checkpointing:
        policy.model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    found: dict[str, Any] = {"gradients": {}, "means": [], "norms": []}
    for step in range(steps):
        groups: list[Group] = policy_of.rollout(rows, step)[0]
        for minibatch in policy.pack(groups, config.minibatch_size):
            for phase in method.phases:
                if step == 0 and phase not in found["gradients"]:
                    found["gradients"][phase] = gradients(policy, method, minibatch, phase)
                found["norms"].append(policy.update(phase, minibatch, method.loss, 0).item())
        means, scored = policy.read_metrics(groups)
        found["means"].append(means)
        found["scores"] = [each.scores for each in scored]
    whole = policy.runtime.whole()
    if whole is not None:
        found["weights"] = {name: p.detach().clone() for name, p in whole.named_parameters()}
    return found


def _compute_in_float64() -> None:
    """Load models in float64 and compute their norms in float64; transformers' norms compute in float32."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    modeling_llama.LlamaRMSNorm.forward = forward
    modeling_qwen2.Qwen2RMSNorm.forward = forward
    for name in ("load_generative", "load_scalar"):
        load = getattr(runtime, name)
        setattr(runtime, name, lambda *args, load=load, **options: load(*args, **options).double())


def in_bfloat16(ranks: Ranks, config: TrainConfig) -> dict[str, Any]:
    """Updates in bfloat16, for a model with a bfloat16 file: master weights, and weights of the sampler."""
    policy_of = FakePolicy(config, says=says, ranks=ranks)
    runtime, sharded = policy_of.runtime, policy_of.runtime.sharded
    assert sharded is not None and sharded.replica is not None
    policy = Policy(runtime, Optimizers(runtime.model.train(), policy_of.method, config, total=100))
    started = runtime.whole()
    groups = policy_of.rollout(read_preferences(str(config.dataset_name)).rows)[0]
    for minibatch in policy.pack(groups, config.minibatch_size):
        for phase in policy_of.method.phases:
            policy.update(phase, minibatch, policy_of.method.loss, 0)
    before = {name: p.clone() for name, p in sharded.replica.named_parameters()}
    sharded.refresh()
    now, ended = dict(sharded.replica.named_parameters()), runtime.whole()
    kinds = {str(p.dtype) for p in sharded.parts.values()}
    found = {"masters": kinds, "before": before, "now": {name: p.detach().clone() for name, p in now.items()}}
    for name, model in (("started", started), ("ended", ended)):
        if model is not None:
            found[name] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return found


def in_bfloat16_over_a_reference(ranks: Ranks, config: TrainConfig) -> dict[bool, dict[str, Tensor]]:
    """Updates of adapters, after a first pass without them, and of a whole model with a frozen reference."""
    found = {}
    for adapters in (True, False):
        changed = dataclasses.replace(config, use_peft=adapters)
        policy_of = FakePolicy(changed, ranks=ranks)
        policy = Policy(policy_of.runtime, Optimizers(policy_of.model.train(), policy_of.method, changed, total=100))
        groups = policy_of.rollout(read_preferences(str(config.dataset_name)).rows)[0]
        (minibatch, *_) = policy.pack(groups, config.minibatch_size)
        found[adapters] = gradients(policy, policy_of.method, minibatch, "policy")
    return found


def all_updated(ranks: Ranks, configs: dict[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """Every case in float32 over one rollout batch, then in float64 over four, which are at least ten updates."""
    if ranks.count == 1:
        ranks = ALONE
    found = {"float32": {name: updated(ranks, config, 1) for name, config in configs.items()}}
    _compute_in_float64()
    return found | {"float64": {name: updated(ranks, config, 4) for name, config in configs.items()}}


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    return tiny_config(folder, **{"minibatch_size": 4, "rollout_batch_size": 12, "token_budget": 150} | changes)
