"""From requests to groups of sampled thoughts."""

from collections.abc import Callable, Sequence

from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group, Request, closed_groups
from dwrl_fast.sampling.sampler import Sampler


def sample_groups(
    requests: Sequence[Request],
    dialog: Dialog | SingleTurn,
    sampler: Sampler,
    n: int,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Group]:
    """One group a request, with `n` thoughts for each of its contexts, which `progress` counts. The contexts are those
    of `dialog`.
    """
    thoughts = sampler.sample(
        [context.ids for request in requests for context in request.contexts],
        n,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return closed_groups(requests, thoughts, dialog)
