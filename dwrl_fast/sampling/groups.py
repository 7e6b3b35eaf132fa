"""From preferences to groups of sampled thoughts."""

from collections.abc import Callable, Sequence

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Context, Dialog, SingleTurn
from dwrl_fast.encode import Group, closed_groups
from dwrl_fast.sampling.sampler import Sampler


def sample_groups(
    rows: Sequence[Preference],
    contexts: Sequence[Sequence[Context]],
    dialog: Dialog | SingleTurn,
    sampler: Sampler,
    n: int,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Group]:
    """One group a row, with `n` thoughts for each of its `contexts`, which `progress` counts; old_logprobs are the
    sampler's.
    """
    thoughts = sampler.sample(
        [context.ids for of_row in contexts for context in of_row],
        n,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return closed_groups(rows, contexts, thoughts, dialog)
