"""Converts a plan to the tiles of the tree-attention kernels. Done on the host once per plan; all layers use the
result.

Shapes: U tokens, M nodes, TQ tiles of queries, TK of keys, E entries of the lists of keys.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dwrl_fast.ops.oracle import Plan

Ints = npt.NDArray[np.int64]


class QueryTiles(NamedTuple):
    """Tiles of queries and the keys that each tile reads. All int32, on the device of the attention.

    order: [TQ], the tiles, sorted by the number of keys, largest first. bounds: [TQ + 1], the range of each tile's
    entries in `keys`. shared: [TQ], the number of leading entries that all queries of the tile see. keys: [E]. below,
    place: [U], the end of the subtree of each token's node, and the number of tokens before it on its path.
    """

    order: Tensor
    bounds: Tensor
    shared: Tensor
    keys: Tensor
    below: Tensor
    place: Tensor


class KeyTiles(NamedTuple):
    """Tiles of keys. Each is read by the queries from its first key to the end of its subtree, in one run or several.

    runs: [R, 4] int32: tile, first query, end of the queries, and the index of its partial sum if the tile has several
    runs, otherwise -1; the longest runs first. split: [S, 3] int32: each tile with several runs, and the range of its
    partial sums. parts: P, the number of partial sums. below, place: as in `QueryTiles`.
    """

    runs: Tensor
    split: Tensor
    parts: int
    below: Tensor
    place: Tensor


# Runs are split so that a GPU gets several programs per multiprocessor, but not below a length that justifies an extra
# sum.
PROGRAMS, SHORTEST_RUN, RUN_UNIT = 512, 1024, 128


@dataclass(frozen=True)
class Forest:
    """The non-empty nodes of a plan, on the host.

    start, stop, below: [M], the range of their own tokens, and the end of their descendants' tokens. paths: for each
    node, the nodes from the root to itself.
    """

    start: Ints
    stop: Ints
    below: Ints
    paths: list[list[int]]
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """The number of tokens, U."""
        return int(self.stop[-1]) if len(self.stop) else 0

    @property
    def longest_path(self) -> int:
        """The length of the longest path, in tokens."""
        return max((int((self.stop - self.start)[path].sum()) for path in self.paths), default=0)

    def tokenwise(self) -> tuple[Ints, Ints]:
        """[U] each: below, place."""
        sizes = self.stop - self.start
        before = np.array([int(sizes[path[:-1]].sum()) for path in self.paths])
        return np.repeat(self.below, sizes), np.arange(self.tokens) + np.repeat(before - self.start, sizes)

    def queries(self, tile: int, window: int | None, device: torch.device) -> QueryTiles:
        """Tiles of `tile` queries. With a window, a tile may include keys that none of its queries sees."""
        key = ("queries", tile, window, device)
        if key not in self.made:
            self.made[key] = QueryTiles(*(_put(x, device) for x in self._queries(tile, window)))
        found: QueryTiles = self.made[key]
        return found

    def keys(self, tile: int, heads: int, device: torch.device) -> KeyTiles:
        """Tiles of `tile` keys, for `heads` key heads."""
        key = ("keys", tile, heads, device)
        if key not in self.made:
            runs, split, parts = self._runs(tile, heads)
            put = [_put(x, device) for x in (runs, split, *self.tokenwise())]
            self.made[key] = KeyTiles(put[0], put[1], parts, put[2], put[3])
        found: KeyTiles = self.made[key]
        return found

    def _runs(self, tile: int, heads: int) -> tuple[Ints, Ints, int]:
        below, _ = self.tokenwise()
        first = np.arange(0, self.tokens, tile)
        ends = np.maximum.reduceat(below, first)
        even = int((ends - first).sum()) * heads // PROGRAMS
        longest = max(SHORTEST_RUN, -(-even // RUN_UNIT) * RUN_UNIT)
        count = -(-(ends - first) // longest)
        of = np.repeat(np.arange(len(first)), count)
        low = first[of] + longest * ranges(np.zeros_like(count), count)
        part = np.where(count[of] > 1, (count[of] > 1).cumsum() - 1, -1)
        high = np.minimum(low + longest, ends[of])
        runs = np.stack([of, low, high, part], 1)[np.argsort(low - high, kind="stable")]
        several = np.flatnonzero(count > 1)
        bounds = np.append(0, count[several].cumsum())
        return runs, np.stack([several, bounds[:-1], bounds[1:]], 1), int(bounds[-1])

    def _queries(self, tile: int, window: int | None) -> tuple[Ints, ...]:
        below, place = self.tokenwise()
        first = np.arange(0, self.tokens, tile)
        last = np.minimum(first + tile, self.tokens)
        starts, stops, count = [], [], []
        for a, b, node in zip(first, last, np.searchsorted(self.stop, first, "right"), strict=True):
            path = self.paths[node]
            starts += [*self.start[path], a]
            stops += [*self.stop[path[:-1]], a, b]
            count.append(len(path) + 1)
        sizes = np.array(stops) - np.array(starts)
        keys = ranges(np.array(starts), sizes)
        of = np.repeat(np.repeat(np.arange(len(first)), count), sizes)
        shared = (keys < first[of]) & (below[keys] >= last[of])
        if window is not None:
            least, most = (each.reduceat(place, first) for each in (np.minimum, np.maximum))
            seen = least[of] - place[keys] < window
            shared &= most[of] - place[keys] < window
            keys, of, shared = keys[seen], of[seen], shared[seen]
        sort = np.lexsort((~shared, of))
        entries = np.bincount(of, minlength=len(first))
        return (
            np.argsort(-entries, kind="stable"),
            np.append(0, entries.cumsum()),
            np.bincount(of[shared], minlength=len(first)),
            keys[sort],
            below,
            place,
        )


_FORESTS: MutableMapping[Tensor, tuple[Tensor, Tensor, Forest]] = WeakIdKeyDictionary()  # key: the plan's start


def forest(plan: Plan, tokens: int) -> Forest:
    """`plan` read on the host, once per plan: only the first layer waits for a plan on a GPU.

    Raises ValueError if it is not a depth-first cover of `tokens` tokens.
    """
    found = _FORESTS.get(plan.start)
    if found is None or found[0] is not plan.stop or found[1] is not plan.parent:
        found = _FORESTS[plan.start] = plan.stop, plan.parent, _read(plan)
    if found[2].tokens != tokens:
        raise ValueError(f"the tree has {found[2].tokens} tokens; q has U = {tokens}")
    return found[2]


def _read(plan: Plan) -> Forest:
    start, stop, parent = (x.tolist() for x in (plan.start, plan.stop, plan.parent))
    at = 0
    open_nodes: list[int] = []  # from the root to the last one
    paths: list[list[int]] = []  # as indices of non-empty nodes
    place: list[list[int]] = []
    held: list[int] = []
    for node, above in enumerate(parent):
        if start[node] != at or stop[node] < at:
            raise ValueError(
                f"node {node} has tokens [{start[node]}, {stop[node]}): nodes must follow one another from 0"
            )
        while open_nodes and open_nodes[-1] != above:
            open_nodes.pop()
        if above != (open_nodes[-1] if open_nodes else -1):
            raise ValueError(
                f"node {node} has parent {above}, which is not on the path to node {node - 1}: nodes must be in "
                "depth-first order"
            )
        open_nodes.append(node)
        place.append(place[above] if above >= 0 else [])
        if stop[node] > at:
            place[node] = [*place[node], len(held)]
            paths.append(place[node])
            held.append(node)
        at = stop[node]
    begin, end = np.array(start, np.int64)[held], np.array(stop, np.int64)[held]
    below = end.copy()
    for path in reversed(paths):
        for above, node in pairwise(path[-2:]):
            below[above] = max(below[above], below[node])
    return Forest(begin, end, below, paths)


def ranges(start: Ints, size: Ints) -> Ints:
    """The ranges [start[i], start[i] + size[i]), concatenated."""
    return np.repeat(start - np.cumsum(size) + size, size) + np.arange(size.sum())


def _put(x: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(x.astype(np.int32)).to(device)
