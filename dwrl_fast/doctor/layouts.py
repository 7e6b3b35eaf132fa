"""Checks that results do not depend on the rest of the batch or on the layout."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from dwrl_fast.batching.layout import Packing
from dwrl_fast.doctor.finding import Finding, status_of
from dwrl_fast.doctor.setup import NATS_FAIL, NATS_WARN, Computed, Setup, compute, difference
from dwrl_fast.encode import Group

TOKENS = 32  # length of thoughts that are sampled again; the beginning of a thought does not depend on the limit
FEW = 2  # groups, and thoughts per response, that are computed again


def one_and_many(
    setup: Setup, contexts: Sequence[Sequence[int]], groups: Sequence[Group], computed: Sequence[Computed], seed: int
) -> Iterator[Finding]:
    """Compare thoughts sampled alone with those sampled in a batch, and groups computed alone with all computed
    together.
    """
    alone = [compute(setup, [group])[0] for group in groups[:FEW]]
    yield _finding(
        "a group alone",
        f"{len(alone)} of {len(groups)} groups computed alone",
        difference(alone, computed[:FEW]),
        "Rounding grows with --dtype bf16; in fp32 this is a fault of the kernels: please report it with this line.",
    )
    if setup.samples_itself and contexts:
        yield _sampled_alone(setup, contexts, groups, seed)


def _sampled_alone(setup: Setup, contexts: Sequence[Sequence[int]], groups: Sequence[Group], seed: int) -> Finding:
    assert setup.sampler is not None
    together = [some[0] for group in groups for some in group.thoughts]
    compared, apart, rounded = 0, [0.0], 0
    for place in {0, len(contexts) - 1}:
        ((thought,),) = setup.sampler.sample(
            [contexts[place]],
            1,
            max_tokens=min(TOKENS, setup.config.max_completion_length),
            temperature=setup.method.sampling_temperature,
            seed=seed,
        )
        other = together[place]
        most = min(len(thought.ids), len(other.ids))
        same = next((i for i in range(most) if thought.ids[i] != other.ids[i]), most)
        apart += [abs(thought.logprobs[i] - other.logprobs[i]) for i in range(same)]
        rounded += same < most
        compared += same
    mean = sum(apart) / len(apart)
    status = status_of(mean, NATS_WARN, NATS_FAIL)
    if compared == 0:
        status = "fail"
    elif rounded and status == "pass":
        status = "warn"
    return Finding(
        "a thought alone",
        status,
        f"{compared} tokens of thoughts sampled alone equal those sampled in a batch, with log-probs within "
        f"{max(apart):.2g} nats{f'; {rounded} of 2 thoughts differ after that' if rounded else ''}",
        "A thought must depend on its own seed alone. If the engine's rounding depends on the batch, this check "
        "warns now and then and runs cannot be repeated bit for bit; --dtype fp32 makes this rarer. If the check "
        "fails, the engine must give each request its own seed (sampling.request_key).",
        {"tokens": compared, "most": max(apart), "differ": rounded},
    )


def tree_and_padded(setup: Setup, groups: Sequence[Group]) -> Finding | None:
    """Compare the run's layout with one that shares nothing; None if the model can run only one."""
    own: Packing = setup.config.packing
    other: Packing = "padded" if own != "padded" else "tree"
    if own == "padded" and not setup.runtime.model.shares_cache:
        return None
    few = [shortened(group) for group in groups[:FEW]]
    both = compute(setup, few), compute(setup, few, other)
    return _finding(
        "layouts",
        f"{own} and {other}",
        difference(*both),
        f"Use --packing {'padded' if own != 'padded' else 'tree'}, or --dtype fp32, and report this model.",
    )


def shortened(group: Group) -> Group:
    """The group with only the first thoughts about each response."""
    return dataclasses.replace(
        group,
        sequences=[some[:FEW] for some in group.sequences],
        thoughts=[some[:FEW] for some in group.thoughts],
    )


def _finding(name: str, what: str, apart: dict[str, float], remedy: str) -> Finding:
    means = [value for key, value in apart.items() if key.endswith("mean")]
    parts = [
        f"{said} differ by {apart[key + ' mean']:.2g} nats on average, {apart[key + ' most']:.2g} at most"
        for key, said in (("scores", "scores"), ("logprobs", "log-probs"))
        if key + " mean" in apart
    ]
    worst = torch.tensor(means).max().item()  # NaN if any of them is NaN
    return Finding(name, status_of(worst, NATS_WARN, NATS_FAIL), f"{what}: {'; '.join(parts)}", remedy, apart)
