"""Distributes whole groups over ranks so that each rank computes about the same amount."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from dwrl_fast.encode import Group


class Cost(NamedTuple):
    """Multiply-adds of a forward pass: per token in the backbone, per row in the head, and per pair of tokens of which
    one attends to the other.
    """

    token: int = 1
    row: int = 0
    pair: int = 0

    def of(self, groups: Sequence[Group], tokens: Sequence[int], pairs: Sequence[int]) -> list[int]:
        """The cost of each of `groups`. tokens, pairs: positions and attention pairs of each group in the backbone."""
        rows = [sum(one.thought.stop - one.thought.start + 1 for one in group.flat) for group in groups]
        sized = zip(tokens, rows, pairs, strict=True)
        return [self.token * token + self.row * row + self.pair * pair for token, row, pair in sized]


BY_TOKENS = Cost()
CLOSE = 1.005  # times the mean; costs are not known more exactly


def balanced(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """For each of `ranks`, the indices into `costs` of its share, ascending. Every rank computes the same result.

    Assigns the largest first (Graham, 1969). Then moves and exchanges items of the most loaded rank, until its load is
    at most `CLOSE` times the mean or nothing helps.
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
    """The move that lowers the largest load the most: the giving rank, the receiving rank, the item given, and the item
    taken in exchange, if any.
    """
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
