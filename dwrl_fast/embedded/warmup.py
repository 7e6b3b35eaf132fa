"""Trains a tiny decoder to think and to judge, with enough errors that reinforcement learning can improve it.

Cross-entropy on thought and verdict, in two stages: first clean thoughts, to learn the arithmetic; then noisy thoughts,
which teach wrong sums, agreement with the claim, and lazy verdicts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dwrl_fast.embedded.arrays import IGNORED, dialog, warmup_arrays
from dwrl_fast.embedded.task import Array, Claims, Noise, Thoughts, draw_claims
from dwrl_fast.embedded.tokenizer import IDS

Progress = Callable[[str, int, int, dict[str, float]], None]
Draw = Callable[[Array, int, float, Noise, np.random.Generator], tuple[Array, Array]]
THOUGHT_TOKENS = 12  # tokens of a well-formed thought, including its end-of-turn


@dataclass(frozen=True)
class WarmupStage:
    """Steps of the warm-up under one noise and one learning-rate schedule."""

    name: str
    steps: int
    learning_rate: float
    noise: Noise
    warmup_steps: int = 100
    easy_fraction: float = 0.3


@dataclass(frozen=True)
class Warmup:
    """All settings of the warm-up. Batch sizes count sequences; the formats have equal shares."""

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 256
    batch_size: int = 96
    stages: tuple[WarmupStage, ...] = field(
        default=(
            WarmupStage("clean", 400, 4e-3, Noise()),
            WarmupStage("noisy", 250, 1.5e-3, Noise(step_error=0.2, sycophancy=0.55, flip=0.1, lazy=0.3)),
        )
    )


def draw_model(plan: Warmup, seed: int) -> LlamaForCausalLM:
    """A decoder with weights drawn from `seed`; the global random state is not changed."""
    config = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=64,
        initializer_range=0.1,  # with the usual .02 such a narrow model needs twice the steps and reaches plateaus
        tie_word_embeddings=True,
        pad_token_id=IDS["<|pad|>"],
        bos_token_id=None,
        eos_token_id=IDS["<|end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _factor(step: int, stage: WarmupStage) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine to a tenth."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def warm_up(
    model: LlamaForCausalLM,
    plan: Warmup,
    pool: Array,
    rng: np.random.Generator,
    progress: Progress | None = None,
    draw: Draw = warmup_arrays,
) -> None:
    """Train `model` in place on the sequences that `draw` makes from the prompts of `pool` [P, D]."""
    model.train()
    for stage in plan.stages:
        ids, targets = draw(pool, stage.steps * plan.batch_size, stage.easy_fraction, stage.noise, rng)
        batches = zip(*(torch.from_numpy(array).split(plan.batch_size) for array in (ids, targets)), strict=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        for step, (batch, target) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = stage.learning_rate * _factor(step, stage)
            # Padding is on the right and never a target, so the causal mask suffices and no mask tensor is needed.
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(stage.name, step + 1, stage.steps, {"loss": loss.item()})
    model.eval()


@torch.no_grad()
def sample_thoughts(model: LlamaForCausalLM, claims: Claims, generator: torch.Generator) -> Tensor:
    """One thought per claim, sampled from the model: ids [B, THOUGHT_TOKENS]."""
    rows = len(claims.claim)
    nothing = Thoughts(np.zeros((rows, 0), int), np.zeros(rows, bool), np.zeros(rows, bool))
    ids, targets = dialog(claims, nothing)
    context = int((targets[0] == IGNORED).argmin())
    step, cache, drawn = torch.from_numpy(ids[:, :context]), None, []
    for _ in range(THOUGHT_TOKENS):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        step = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        drawn.append(step)
    return torch.cat(drawn, dim=1)


def share_correct(model: LlamaForCausalLM, claims: Claims, generator: torch.Generator) -> float:
    """The share of sampled thoughts whose last running sum is the right answer."""
    thoughts = sample_thoughts(model, claims, generator)
    truth = torch.from_numpy(claims.truth) + IDS["0"]
    return (thoughts[:, THOUGHT_TOKENS - 4] == truth).float().mean().item()


def state_reached(model: LlamaForCausalLM, pool: Array, count: int, seed: int) -> dict[str, float]:
    """Shares of correct thoughts about right claims and about hard wrong claims, at the start of reinforcement
    learning.
    """
    right, wrong = draw_claims(pool, count, 0.0, np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(seed)
    return {
        "thought_correct_chosen": share_correct(model, right, generator),
        "thought_correct_rejected": share_correct(model, wrong, generator),
    }
