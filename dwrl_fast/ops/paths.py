"""tree_attention as attention within segments of unequal length (varlen). The layout of a plan is made once, and every
layer uses it. There are two ways.

**By path**: one causal call. The keys of a node are the end of its path, as far back as its first token sees. They are
gathered (copied), and gathered again in the backward pass, where the gradients of a key's copies are summed.

**By depth**: one causal call takes the own tokens of every node, in place. Then one call for each depth takes the nodes
of that depth that have descendants: all tokens below such a node attend to all of its tokens, without a causal mask.
The outputs are merged by their log-sum-exp. The backward pass repeats the calls with the merged output and log-sum-exp,
so that each call gives its part of the gradients.

A sliding window cuts across nodes, so it always goes by path. Otherwise the way that moves fewer bytes is taken: paths
where keys are few and short beside queries, depths where many short nodes hang on a long path. The order of every sum
follows from the plan.

Shapes: U tokens, M nodes, Tq queries and Tk keys of one call.
"""

import functools
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from dwrl_fast.ops.oracle import Plan
from dwrl_fast.ops.products import wide
from dwrl_fast.ops.varlen import Gradients, Saved, Segments, Varlen, VarlenOptions

Ints = npt.NDArray[np.int64]

# Bytes read and written beside the kernels' own, counted over the operations below in rows of q and of k with v. For a
# key on a path: gathering it twice, and the sum of its gradients; for a copy of one the kernels' gradient of it by
# query head. For a query that meets one more depth: gathering it, and q, out and their gradients merged in float32.
PER_KEY_KV, PER_COPY_Q, PER_QUERY = 5, 4, 45


@dataclass(frozen=True, slots=True)
class Call:
    """One varlen call.

    queries, keys: [Tq] and [Tk] int64, the rows of the U tokens that it reads; None is all of them. copies: where a key
    is read more than once, the order [Tk] that brings its copies together, and the bounds [U + 1] of each token's
    copies in that order.
    """

    segments: Segments
    queries: Tensor | None = None
    keys: Tensor | None = None
    copies: tuple[Tensor, Tensor] | None = None


@torch.compiler.disable
def varlen_tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, varlen: Varlen, options: VarlenOptions
) -> Tensor:
    """`ops.tree_attention` by the kernels of `varlen`: [U, Hq, D], differentiable once. U must be above 0.

    Raises ValueError where the plan is no depth-first cover of the U tokens.
    """
    layout = _layout(plan, len(q))
    if options.window is not None and options.window >= layout.longest_path:
        options = options._replace(window=None)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    calls = layout.calls(options.window, q.device, q.shape[1] // k.shape[1])
    out: Tensor = _TreeAttention.apply(q, k, v, calls, varlen, options)
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: list[Call], varlen: Varlen, options: VarlenOptions
    ) -> Tensor:
        first, *others = calls
        out, lse = varlen.forward(q, _rows(k, first.keys), _rows(v, first.keys), first.segments, options)
        if others:
            total = out.to(wide(out.dtype))
            for call in others:
                given = _rows(q, call.queries), _rows(k, call.keys), _rows(v, call.keys)
                _merge(total, lse, call, *varlen.forward(*given, call.segments, options))
            out = total.to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = calls, varlen, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        calls, varlen, options = ctx.how
        saved = Saved(*ctx.saved_tensors)
        first, *others = calls
        dq, dk, dv = _part(first, grad, saved, varlen, options)
        if first.copies:
            dk, dv = (_sum_copies(x, *first.copies) for x in (dk, dv))
        if others:
            dq = dq.to(wide(dq.dtype))  # a row for each depth comes to it; to a key's row, one at most
            for call in others:
                some = _part(call, grad, saved, varlen, options)
                for total, part, rows in zip((dq, dk, dv), some, (call.queries, call.keys, call.keys), strict=True):
                    assert rows is not None
                    total.index_copy_(0, rows, total.index_select(0, rows) + part)
        return dq.to(grad.dtype), dk, dv, None, None, None


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _merge(total: Tensor, lse: Tensor, call: Call, part: Tensor, part_lse: Tensor) -> None:
    """Into out and lse over the keys so far, in place, those over the keys of one more call."""
    assert call.queries is not None
    before = lse.index_select(1, call.queries)
    both = torch.logaddexp(before, part_lse)
    kept, added = ((x - both).exp().t()[..., None] for x in (before, part_lse))
    total.index_copy_(0, call.queries, total.index_select(0, call.queries) * kept + part * added)
    lse.index_copy_(1, call.queries, both)


def _part(call: Call, grad: Tensor, saved: Saved, varlen: Varlen, options: VarlenOptions) -> Gradients:
    q, k, v, out, lse = saved
    lse = lse if call.queries is None else lse.index_select(1, call.queries)
    read = Saved(_rows(q, call.queries), _rows(k, call.keys), _rows(v, call.keys), _rows(out, call.queries), lse)
    return varlen.backward(_rows(grad, call.queries), read, call.segments, options)


def _sum_copies(x: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    """[Tk, ...] -> [U, ...]; the copies of a number are summed in order."""
    if x.device.type == "cuda":
        from dwrl_fast.kernels.copies import sum_copies

        return sum_copies(x, order, bounds)
    together = x.index_select(0, order).to(wide(x.dtype))
    return torch.segment_reduce(together, "sum", lengths=bounds.diff(), axis=0, unsafe=True).to(x.dtype)


@dataclass(frozen=True)
class _Layout:
    """A plan's nodes that hold tokens, on the host: start and stop of their own, where their descendants end; the
    nodes on the path to each, from the root to itself.
    """

    start: Ints
    stop: Ints
    below: Ints
    paths: list[list[int]]
    made: dict[tuple[int | None, torch.device, bool], list[Call]] = field(default_factory=dict)

    @functools.cached_property
    def longest_path(self) -> int:
        sizes = self.stop - self.start
        return max(int(sizes[path].sum()) for path in self.paths)

    def calls(self, window: int | None, device: torch.device, group: int) -> list[Call]:
        """group: query heads that share a key head."""
        alone = all(len(path) == 1 for path in self.paths)  # nothing to gather: a window is the kernel's to keep
        by_path = not alone and (window is not None or self.shorter_by_path(group))
        found = self.made.get((window, device, by_path))
        if found is None:
            found = [self._by_path(window or self.longest_path, device)] if by_path else self._by_depth(device)
            self.made[window, device, by_path] = found
        return found

    def shorter_by_path(self, group: int) -> bool:
        """Whether copying keys along whole paths moves fewer bytes than a call for each depth."""
        return self.by_path_cost(group) < self.by_depth_cost()

    @functools.cached_property
    def rows(self) -> tuple[int, int]:
        """How many keys are read along all paths, and how many queries by all depths but their own."""
        sizes = self.stop - self.start
        keys = sum(int(sizes[path].sum()) for path in self.paths)
        return keys, sum(int(own) * (len(path) - 1) for own, path in zip(sizes, self.paths, strict=True))

    def by_path_cost(self, group: int) -> float:
        """In rows of q, as `by_depth_cost`: beside what the kernels read and write of any sequences."""
        keys, _ = self.rows
        copies = keys - int((self.stop - self.start).sum())
        return keys * PER_KEY_KV * 2 / group + copies * PER_COPY_Q * (group > 1)

    def by_depth_cost(self) -> float:
        _, queries = self.rows
        return float(queries * PER_QUERY)

    def _by_depth(self, device: torch.device) -> list[Call]:
        sizes, below = self.stop - self.start, self.below - self.stop
        depth = np.array([len(path) for path in self.paths])
        calls = [Call(_segments(sizes, sizes, True, device))]
        for level in range(1, int(depth.max()) + 1):
            inner = np.flatnonzero((depth == level) & (below > 0))
            if len(inner):
                queries, keys = _ranges(self.stop[inner], below[inner]), _ranges(self.start[inner], sizes[inner])
                segments = _segments(below[inner], sizes[inner], False, device)
                calls.append(Call(segments, _put(queries, device), _put(keys, device)))
        return calls

    def _by_path(self, window: int, device: torch.device) -> Call:
        own = self.stop - self.start
        starts, sizes, seen = [], [], []
        for path in self.paths:
            left = int(own[path[-1]]) + window - 1
            pieces: list[tuple[int, int]] = []
            for node in reversed(path):
                size = min(left, int(own[node]))
                pieces.append((int(self.stop[node]) - size, size))
                left -= size
            pieces.reverse()
            starts += [start for start, _ in pieces]
            sizes += [size for _, size in pieces]
            seen.append(sum(size for _, size in pieces))
        keys = _ranges(np.array(starts), np.array(sizes))
        order, counts = keys.argsort(kind="stable"), np.bincount(keys, minlength=int(self.stop[-1]))
        copies = _put(order, device), _put(np.append(0, counts.cumsum()), device)
        return Call(_segments(own, np.array(seen), True, device), keys=_put(keys, device), copies=copies)


_LAYOUTS: MutableMapping[Tensor, tuple[Tensor, Tensor, _Layout]] = WeakIdKeyDictionary()  # by the plan's start


def _layout(plan: Plan, tokens: int) -> _Layout:
    """Made once a plan: a plan on a GPU is waited for then, and not in the layers that follow."""
    found = _LAYOUTS.get(plan.start)
    if found is None or found[0] is not plan.stop or found[1] is not plan.parent:
        found = _LAYOUTS[plan.start] = plan.stop, plan.parent, _read(plan)
    layout = found[2]
    if (covered := int(layout.stop[-1]) if len(layout.stop) else 0) != tokens:
        raise ValueError(f"the tree has {covered} tokens; q has U = {tokens}")
    return layout


def _read(plan: Plan) -> _Layout:
    start, stop, parent = (x.tolist() for x in (plan.start, plan.stop, plan.parent))
    at = 0
    open_nodes: list[int] = []  # from the root to the last one
    paths: list[list[int]] = []  # as places among the nodes that hold tokens
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
    return _Layout(begin, end, below, paths)


def _ranges(start: Ints, size: Ints) -> Ints:
    """[start[i], start[i] + size[i]) for each i, joined."""
    end = size.cumsum()
    return np.arange(end[-1]) + np.repeat(start - end + size, size)


def _segments(queries: Ints, keys: Ints, causal: bool, device: torch.device) -> Segments:
    bounds_q, bounds_k = (_put(np.append(0, x.cumsum()).astype(np.int32), device) for x in (queries, keys))
    return Segments(bounds_q, bounds_k, int(queries.max()), int(keys.max()), causal)


def _put(x: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(x).to(device)
