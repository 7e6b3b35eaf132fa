"""Sampling by all ranks: each rank samples the thoughts of a share of the contexts, and all ranks get all thoughts."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dwrl_fast.encode.thought import Thought
from dwrl_fast.ranks import Ranks
from dwrl_fast.sampling.sampler import Rating, RatingSampler, Sampler


class SplitSampler:
    """A Sampler over one `sampler` per rank. `refresh` updates the sampler's model before each call.

    All ranks call it together, with the same contexts. A thought's draws follow what it is for, so the ranks together
    write what one would. A UserError on one of them is raised on all.
    """

    def __init__(self, sampler: Sampler, ranks: Ranks, refresh: Callable[[], None]):
        self.sampler, self.ranks, self.refresh = sampler, ranks, refresh
        self.float32 = sampler.float32

    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        n: int,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Thought]]:
        """See `Sampler.sample`."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        places = self._places(contexts, n, max_tokens)
        return self._joined(self.sampler.sample, contexts, n, places, options, progress)

    def _places(self, contexts: Sequence[Sequence[int]], n: int, max_tokens: int) -> list[range]:
        """The indices of each rank's contexts, with about the same number of tokens. Ranges are contiguous, because
        adjacent contexts share prefixes.
        """
        sizes = np.array([len(context) + n * max_tokens for context in contexts], dtype=np.int64)
        middle = np.cumsum(sizes) - sizes / 2
        edges = np.searchsorted(middle, sizes.sum() * np.arange(self.ranks.count + 1) / self.ranks.count).tolist()
        return [range(first, last) for first, last in itertools.pairwise(edges)]

    def _joined(
        self,
        sample: Callable[..., list[list[Thought]]],
        contexts: Sequence[Sequence[int]],
        n: int,
        places: Sequence[range],
        options: dict[str, Any],
        progress: Callable[[int], None] | None,
    ) -> list[list[Thought]]:
        own = places[self.ranks.rank]
        self.refresh()
        found = self.ranks.agreed(lambda: sample(contexts[own.start : own.stop], n, progress=progress, **options))
        joined = self.ranks.joined(found, places)
        if progress is not None:
            progress(len(contexts) - len(own))
        return joined


class SplitRatingSampler(SplitSampler):
    """The same for samplers that can also rate."""

    sampler: RatingSampler

    def rated(
        self,
        contexts: Sequence[Sequence[int]],
        n: int,
        rating: Rating,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Thought]]:
        """See `RatingSampler.rated`."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        places = self._places(contexts, n, max_tokens + rating.most)
        first = places[self.ranks.rank].start
        own = rating._replace(close=lambda number, ids: rating.close(first + number, ids))
        return self._joined(partial(self.sampler.rated, rating=own), contexts, n, places, options, progress)


def split(sampler: Sampler, ranks: Ranks, refresh: Callable[[], None]) -> Sampler:
    """`sampler` shared by `ranks`; with one process `sampler` itself."""
    if ranks.mesh is None:
        return sampler
    made = SplitRatingSampler if isinstance(sampler, RatingSampler) else SplitSampler
    return made(sampler, ranks, refresh)
