"""A real update by ranks under PyTorch's profiler: the most memory that its own allocation events add up to."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dwrl_fast.compute import Compute
from dwrl_fast.dialog import Dialog, Template
from dwrl_fast.embedded.arrays import EVALUATE, RATE
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.methods import METHODS
from dwrl_fast.plan import PlanConfig
from dwrl_fast.plan.lengths import groups
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.policy import Policy, load_judging
from dwrl_fast.training.rollout import Rollout


def policy_of(config: PlanConfig, ranks: Ranks) -> tuple[Policy, Any, list[Any]]:
    """A policy on the planned model, its method, and a minibatch of groups as long as planned."""
    dialog = Dialog(make_tokenizer(), Template(EVALUATE, RATE))
    method: Any = METHODS[config.method](config, dialog)
    ranks = ALONE if ranks.count == 1 else ranks
    judging = load_judging(config, method, dialog, Compute.resolve(config.dtype), ranks)
    model = judging.runtime.model.train()
    if config.gradient_checkpointing:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(judging.runtime, Optimizers(model, method, config, total=1))
    vocabulary = model.lm.config.vocab_size
    made = groups(config.lengths, method, config.minibatch_size, vocabulary)
    if method.old_policy is not None:
        made = Rollout(method, judging).recomputed(made)[0]
    return policy, method, made


def peak(ranks: Ranks, config: PlanConfig, folder: Path) -> int:
    """Bytes that are allocated at most in an update of every phase, by the profiler's events, whose sums begin before
    the model is made.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        policy, method, made = policy_of(config, ranks)
        (minibatch,) = policy.pack(made, config.minibatch_size)
        with record_function("the update"):
            for phase in method.phases:
                policy.update(phase, minibatch, method.loss, 0)
    file = folder / f"trace-{ranks.rank}.json"
    seen.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    file.unlink()
    update = next(each for each in events if each.get("name") == "the update" and "dur" in each)
    sums = [
        each["args"]["Total Allocated"]
        for each in events
        if each.get("name") == "[memory]" and update["ts"] <= each["ts"] <= update["ts"] + update["dur"]
    ]
    assert len(sums) > 100, "the profiler saw the allocations"
    return int(max(sums))


def several(ranks: Ranks, configs: dict[str, PlanConfig], folder: Path) -> dict[str, int]:
    """The peak of each case on this rank."""
    torch.set_num_threads(1)
    return {name: peak(ranks, config, folder) for name, config in configs.items()}
