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
CLOSE = 1.005  # times the mean: closer than costs are known


def balanced(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The places of `costs` for each of `ranks`, ascending; on every rank the same.

    Largest first (Graham, 1969), then moves and exchanges with the rank that has most, until it has at most `CLOSE`
    times the mean or none of them helps.
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(heap)
        found[rank].append(place)
        heapq.heappush(heap, (load + costs[place], rank))
    loads = [sum(costs[i] for i in places) for places in found]
    while exchange := _exchange(costs, found, loads):
        giver, taker, given, taken = exchange
        _move(costs, found, loads, giver, taker, given)
        if taken is not None:
            _move(costs, found, loads, taker, giver, taken)
    return [sorted(places) for places in found]


def _exchange(
    costs: Sequence[int], found: list[list[int]], loads: list[int]
) -> tuple[int, int, int, int | None] | None:
    """What lowers the largest load the most: from which rank to which, what is given and, if anything, taken for it."""
    most = max(range(len(loads)), key=loads.__getitem__)
    if loads[most] * len(loads) <= CLOSE * sum(loads):
        return None
    best, exchange = loads[most], None
    for rank in range(len(loads)):
        for given in found[most] if rank != most else ():
            for taken in (None, *found[rank]):
                moved = costs[given] - (0 if taken is None else costs[taken])
                load = max(loads[most] - moved, loads[rank] + moved)
                if load < best:
                    best, exchange = load, (most, rank, given, taken)
    return exchange


def _move(costs: Sequence[int], found: list[list[int]], loads: list[int], giver: int, taker: int, place: int) -> None:
    found[giver].remove(place)
    found[taker].append(place)
    loads[giver] -= costs[place]
    loads[taker] += costs[place]
