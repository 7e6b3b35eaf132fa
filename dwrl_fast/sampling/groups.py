"""Samples thoughts for requests and makes groups from them."""

from collections.abc import Callable, Sequence
from functools import partial

from dwrl_fast.dialog import Context, Dialog, SingleTurn
from dwrl_fast.encode import Group, Request, closed_groups
from dwrl_fast.sampling.sampler import Rating, RatingSampler, Sampler


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
    normalization: str | None = None,
) -> list[Group]:
    """One group per request, with `n` thoughts for each of its contexts. `progress` counts contexts. dialog: builds the
    contexts. With `normalization` (see `ops.yes_no_logprob`) a `RatingSampler` also gives the scores.
    """
    contexts = [context for request in requests for context in request.contexts]
    sample = sampler.sample
    if normalization is not None and isinstance(sampler, RatingSampler):
        sample = partial(sampler.rated, rating=_rating(contexts, dialog, normalization))
    thoughts = sample(
        [context.ids for context in contexts],
        n,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return closed_groups(requests, thoughts, dialog)


def _rating(contexts: Sequence[Context], dialog: Dialog | SingleTurn, normalization: str) -> Rating:
    def close(number: int, ids: list[int]) -> list[int]:
        context = contexts[number]
        return dialog.sequence(context, ids).ids[len(context.ids) :]

    assert dialog.label_ids is not None
    most = max((len(close(number, [])) for number in range(len(contexts))), default=0)
    return Rating(close, most, dialog.label_ids, normalization)
