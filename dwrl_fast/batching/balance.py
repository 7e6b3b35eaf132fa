"""Whole groups over ranks, so that each rank computes about as much."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from dwrl_fast.encode import Group


class Cost(NamedTuple):
    """Multiply-adds of a forward pass: for a token in the backbone, for a row in the head, and for a pair of tokens of
    which one attends to the other.
    """

    token: int = 1
    row: int = 0
    pair: int = 0

    def of(self, groups: Sequence[Group], tokens: Sequence[int], pairs: Sequence[int]) -> list[int]:
        """What each of `groups` costs, which takes `tokens` positions and `pairs` of them in the backbone."""
        rows = [sum(one.thought.stop - one.thought.start + 1 for one in group.flat) for group in groups]
        sized = zip(tokens, rows, pairs, strict=True)
        return [self.token * token + self.row * row + self.pair * pair for token, row, pair in sized]


BY_TOKENS = Cost()


def balanced(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The places of `costs` for each of `ranks`, ascending, with sums as even as the largest-first rule makes them.

    Graham (1969): the largest sum is at most 4/3 of the best one. The same on every rank.
    """
    loads = [(0, rank) for rank in range(ranks)]
    found: list[list[int]] = [[] for _ in range(ranks)]
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        found[rank].append(place)
        heapq.heappush(loads, (load + costs[place], rank))
    return [sorted(places) for places in found]
