"""The tree layout stores and computes every shared prefix once. The packed layout shares nothing.

The thoughts of a response share [prompt, response, evaluate turn], the responses of a group share the prompt, and
groups share common beginnings of their prompts. Sharing is found from the token ids, by a path-compressed trie over all
sequences of the micro-batch: a node is a run of tokens, its children are the possible continuations, and a sequence may
end inside a node. Tokens are stored in depth-first order, so a node's descendants follow it without a gap. Siblings are
stored in order of first occurrence, so a change in one thought does not move another.

Shapes: U unique tokens, M nodes; the others are those of batch.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Flat, Ints, head_fields, warn_oversized
from dwrl_fast.encode import Group
from dwrl_fast.ops.tiles import ranges


@dataclass(frozen=True, slots=True)
class TreePlan:
    """The nodes in depth-first order; all tensors are int64 on the CPU. Device tensors are derived from them.

    start, stop: [M], the node's tokens are [start, stop) of the flat tokens; stop[m] is start[m + 1].
    parent: [M], -1 for a root.
    """

    start: Tensor
    stop: Tensor
    parent: Tensor


@dataclass(frozen=True, slots=True)
class TreeBatch(Batch):
    """Unique tokens in depth-first order: input_ids is [U].

    position_ids: [U], the position of each token in its own sequence. The last prefix token predicts the first token of
    several thoughts, so its row is repeated in token_rows.
    """

    position_ids: Tensor
    plan: TreePlan


class _Trie:
    """A path-compressed trie over runs of `ids`. Node n holds the tokens ids[source[n] : source[n] + size[n]]."""

    def __init__(self, flat: Flat) -> None:
        self.ids = flat.ids
        self.source: list[int] = []
        self.size: list[int] = []
        self.children: list[dict[int, int]] = []  # by their first token, in order of first occurrence
        self.roots: dict[int, int] = {}
        for start, size in zip(flat.starts.tolist(), flat.sizes.tolist(), strict=True):
            self._insert(start, start + size)

    def _new(self, source: int, size: int) -> int:
        self.source.append(source)
        self.size.append(size)
        self.children.append({})
        return len(self.source) - 1

    def _insert(self, at: int, stop: int) -> None:
        siblings = self.roots
        while at < stop:
            first = self.ids.item(at)
            node = siblings.get(first)
            if node is None:
                siblings[first] = self._new(at, stop - at)
                return
            shared = self._common(self.source[node], at, min(self.size[node], stop - at))
            if at + shared < stop:
                if shared < self.size[node]:
                    self._split(node, shared)
                elif not self.children[node]:  # this sequence extends all that end here: a longer leaf, not a child
                    self.source[node], self.size[node] = at, stop - at
                    return
            at += shared
            siblings = self.children[node]

    def _common(self, a: int, b: int, size: int) -> int:
        differ = self.ids[a : a + size] != self.ids[b : b + size]
        first = int(differ.argmax())
        return first if differ[first] else size

    def _split(self, node: int, size: int) -> None:
        """Split `node` after `size` tokens: it keeps these, and a new only child gets the rest and the old children."""
        lower = self._new(self.source[node] + size, self.size[node] - size)
        self.children[lower] = self.children[node]
        self.children[node] = {self.ids.item(self.source[lower]): lower}
        self.size[node] = size

    def depth_first(self) -> tuple[list[int], list[int]]:
        """All nodes in depth-first order, and for each the index of its parent in that order."""
        order: list[int] = []
        parent: list[int] = []
        stack = [(node, -1) for node in reversed(self.roots.values())]
        while stack:
            node, above = stack.pop()
            stack += [(child, len(order)) for child in reversed(self.children[node].values())]
            order.append(node)
            parent.append(above)
        return order, parent

    def walk(self, flat: Flat) -> tuple[Ints, Ints]:
        """The nodes on the path of each sequence, sequence by sequence, and the number of its tokens in each."""
        nodes, sizes = [], []
        for at, left in zip(flat.starts.tolist(), flat.sizes.tolist(), strict=True):
            siblings = self.roots
            while left > 0:
                node = siblings[self.ids.item(at)]
                nodes.append(node)
                sizes.append(min(self.size[node], left))
                at, left, siblings = at + self.size[node], left - self.size[node], self.children[node]
        return np.array(nodes), np.array(sizes)


def tree_batch(
    groups: Sequence[Group], device: torch.device, *, shared: bool = True, mask_truncated: bool = False
) -> TreeBatch:
    """Lay `groups` out as a tree; without `shared`, as a forest in which every sequence is a root.

    With `mask_truncated`, thoughts cut at the limit are scored but not trained.
    """
    flat = Flat.of(groups)
    sizes, parent, rows = _shared_nodes(flat) if shared else _lone_nodes(flat)
    start = np.cumsum(sizes) - sizes
    input_ids, position_ids = np.empty(sizes.sum(), np.int64), np.empty(sizes.sum(), np.int64)
    input_ids[rows], position_ids[rows] = flat.ids, ranges(np.zeros_like(flat.sizes), flat.sizes)
    return TreeBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        position_ids=torch.from_numpy(position_ids).to(device),
        plan=TreePlan(*map(torch.from_numpy, (start, start + sizes, np.array(parent)))),
        **head_fields(groups, flat, rows, device, mask_truncated=mask_truncated),
    )


def _nodes(trie: _Trie) -> tuple[list[int], Ints, list[int]]:
    """In depth-first order: the nodes, their sizes, and the indices of their parents."""
    order, parent = trie.depth_first()
    return order, np.array(trie.size)[order], parent


def _shared_nodes(flat: Flat) -> tuple[Ints, list[int], Ints]:
    """The size and parent of each node, in depth-first order, and the position of each token of `flat` in the tree,
    [F].
    """
    trie = _Trie(flat)
    order, sizes, parent = _nodes(trie)
    start_of_node = np.empty_like(sizes)
    start_of_node[order] = np.cumsum(sizes) - sizes
    passed, passed_sizes = trie.walk(flat)
    return sizes, parent, ranges(start_of_node[passed], passed_sizes)


def _lone_nodes(flat: Flat) -> tuple[Ints, list[int], Ints]:
    return flat.sizes, [-1] * len(flat.sizes), np.arange(len(flat.ids))


def tree_sizes(groups: Sequence[Group], *, shared: bool = True) -> list[tuple[int, int]]:
    """For each group alone: its stored tokens, and its pairs of tokens of which one attends to the other."""
    found = []
    for group in groups:
        flat = Flat.of([group])
        sizes, parent = _nodes(_Trie(flat))[1:] if shared else _lone_nodes(flat)[:2]
        above = np.zeros_like(sizes)  # tokens before a node
        for node, up in enumerate(parent):
            above[node] = above[up] + sizes[up] if up >= 0 else 0
        found.append((int(sizes.sum()), int((sizes * above + sizes * (sizes + 1) // 2).sum())))
    return found


def split_tree(groups: Sequence[Group], sizes: Sequence[int], token_budget: int) -> list[list[Group]]:
    """Whole groups into micro-batches of at most `token_budget` tokens as stored, by first fit, the largest first.

    sizes: the stored tokens of each group. Prefixes shared between groups are not subtracted, so a batch may be smaller
    than counted. A group larger than the budget becomes a batch of its own, because splitting it would change its
    weights.
    """
    sized = zip(sizes, groups, strict=True)
    batches: list[list[Group]] = []
    room: list[int] = []
    for size, group in sorted(sized, key=lambda pair: pair[0], reverse=True):
        if size > token_budget:
            warn_oversized(token_budget)
        place = next((b for b, left in enumerate(room) if size <= left), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(token_budget)
        batches[place].append(group)
        room[place] -= size
    return batches
