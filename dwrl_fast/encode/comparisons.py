"""Comparisons of two responses: which responses are shown, in which order, and which one is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from dwrl_fast.data import Preference


@dataclass(frozen=True, slots=True)
class Comparison:
    """Response `first` is shown as A and `second` as B; both are indices into the row's responses. right: 0 if A is
    better, 1 if B is better, None if they tie.
    """

    first: int
    second: int
    right: int | None

    @property
    def places(self) -> tuple[int, int]:
        """Both indices, in the order in which the responses are shown."""
        return self.first, self.second


def both_orders(row: Preference) -> list[Comparison]:
    """Every pair of responses of a row, in both orders."""
    return [_comparison(row, i, j) for i, j in permutations(range(len(row.responses)), 2)]


def drawn_orders(rows: Sequence[Preference], seed: int) -> list[list[Comparison]]:
    """For each row, every pair of responses that do not tie, once, in an order drawn from `seed`."""
    rng = np.random.default_rng(seed)
    drawn = []
    for row in rows:
        pairs = [(i, j) if rng.random() < 0.5 else (j, i) for i, j in combinations(range(len(row.responses)), 2)]
        some = [_comparison(row, i, j) for i, j in pairs]
        drawn.append([comparison for comparison in some if comparison.right is not None])
    return drawn


def _comparison(row: Preference, i: int, j: int) -> Comparison:
    ranks = row.ranks or range(len(row.responses))
    return Comparison(i, j, None if ranks[i] == ranks[j] else int(ranks[i] > ranks[j]))
