"""Checks of the weights: whether they are finite, the generation config in their folder, and whether the sampler uses
the current weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dwrl_fast.compute import step_seed
from dwrl_fast.doctor.finding import Finding
from dwrl_fast.doctor.setup import NATS_WARN, Setup, compute, said
from dwrl_fast.encode import Group, Request
from dwrl_fast.models.finite import listed, not_finite
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring import Runtime

TRIES = 4  # weights to try
SCALES = (0.1, 1.0)  # size of the noise relative to the weight
MOVED = 0.05  # nats by which a change of weights must move the log-probs to be visible
TOKENS = 16
# The fields of a generation config that change sampling, with their neutral values.
SHAPING: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "top_h": None,
    "min_new_tokens": None,
    "guidance_scale": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
OTHER_WEIGHTS = "Use an earlier checkpoint, or copy the model again."


def finite(runtime: Runtime) -> Finding:
    """NaN and infinities, by parameter. All ranks call this together."""
    found = sorted(set(chain(*runtime.ranks.gather(not_finite(runtime.model)))))
    if found:
        return Finding("weights", "fail", f"NaN or infinities in {listed(found)}", OTHER_WEIGHTS)
    count = sum(p.numel() for p in runtime.model.parameters())
    return Finding("weights", "pass", f"all {count:,} are finite")


def generation_config(lm: Any) -> Finding:
    """The settings in the model's folder that would change how an engine samples."""
    config, default = lm.generation_config, type(lm.generation_config)()
    neutral = {name: (None, value, getattr(default, name, None)) for name, value in SHAPING.items()}
    found = [f"{name} {value}" for name in SHAPING if (value := getattr(config, name, None)) not in neutral[name]]
    if not found:
        return Finding("generation_config", "pass", "nothing in it changes sampling")
    return Finding(
        "generation_config",
        "warn",
        f"{', '.join(found)}: the samplers here ignore it, but it is saved with the model, and an engine that applies "
        "it samples from a distribution that was not trained",
        "Remove these lines from generation_config.json in the model's folder, or serve the model without it (vLLM: "
        'generation_config="vllm").',
    )


def current(setup: Setup, requests: Sequence[Request], seed: int) -> Finding:
    """Check that thoughts come from the current weights. One weight is changed and the change is announced as in
    training; then thoughts are sampled and the weight is restored.
    """
    name, gap, moved = "", 0.0, 0.0
    for (weight, part), scale in product(small_weights(setup.runtime), SCALES):
        with changed(setup.runtime, part, scale):
            groups = _sampled(setup, requests[: setup.runtime.ranks.count], seed)  # from the sampler of every rank
            fresh = torch.cat([one.logprobs for one in compute(setup, groups)])
        before = torch.cat([one.logprobs for one in compute(setup, groups)])
        gap, moved = (fresh - said(groups)).abs().mean().item(), (fresh - before).abs().mean().item()
        name = weight
        if moved >= MOVED:
            break
    figures = {"gap": gap, "moved": moved}
    if not moved >= MOVED:
        seen = (
            f"no change of a small weight (the last was {name}) moved log-probs by {MOVED} nats, so the check says "
            "nothing"
        )
        remedy = "Compare sampler_gap_mean in metrics.jsonl of a short run with --old_logprobs recompute."
        return Finding("fresh weights", "warn", seen, remedy, figures)
    seen = f"a change of {name} moved the log-probs by {moved:.2g} nats; the sampler's log-probs differ by {gap:.2g} "
    seen += "nats from those of the changed model"
    if gap > max(moved / 2, NATS_WARN):
        return Finding(
            "fresh weights",
            "fail",
            seen + ": the engine samples from weights that are not those of the model",
            "Before each rollout the engine must load the new weights and then reset its prefix cache. The samplers "
            "of this package do so: use one of them.",
            figures,
        )
    return Finding("fresh weights", "pass", seen, figures=figures)


def small_weights(runtime: Runtime) -> list[tuple[str, Tensor]]:
    """Trained weights that may be changed for a trial, by name: the smallest ones, first those on which cached keys and
    values also depend. For sharded weights, the part of this rank.
    """
    trained = [(name, p) for name, p in runtime.model.named_parameters() if p.requires_grad]
    small = sorted(trained, key=lambda each: each[1].numel())
    return [(name, p.to_local() if isinstance(p, DTensor) else p) for name, p in small[:TRIES]]


@contextmanager
def changed(runtime: Runtime, part: Tensor, scale: float = 1.0) -> Iterator[None]:
    """A context in which noise is added to a weight. The runtime is notified as in training. The weight is restored at
    the end.
    """
    before = part.detach().clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(before.shape, generator=generator).to(before)
    size = before.float().square().mean().sqrt().clamp_min(0.1).item() if before.numel() else 0.0
    try:
        with torch.no_grad():
            part.add_(scale * size * noise)
        runtime.changed()
        yield
    finally:
        with torch.no_grad():
            part.copy_(before)
        runtime.changed()


def _sampled(setup: Setup, requests: Sequence[Request], seed: int) -> list[Group]:
    assert setup.sampler is not None
    return sample_groups(
        requests,
        setup.method.question,
        setup.sampler,
        2,
        max_tokens=min(TOKENS, setup.config.max_completion_length),
        temperature=setup.method.sampling_temperature,
        seed=step_seed(seed, "fresh weights", 0),
    )
