"""The tree of what contexts have in common: every run of tokens that several share is one node."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LEAST = 16  # tokens that a shared run must have: below that a tile of its own costs more than it saves


@dataclass(eq=False, slots=True)
class Prefix:
    """A run of tokens of one context or several, from `position` on, after those of `parent`.

    number: its place in depth-first order. below: contexts that end here or further down.
    """

    parent: "Prefix | None"
    position: int
    ids: list[int]
    children: list["Prefix"] = field(default_factory=list)
    number: int = -1
    below: int = 0

    @property
    def stop(self) -> int:
        """The position after its last token."""
        return self.position + len(self.ids)

    def path(self) -> list["Prefix"]:
        """From the root to this one."""
        found: list[Prefix] = []
        node: Prefix | None = self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


def prefix_tree(contexts: Sequence[Sequence[int]]) -> list[Prefix]:
    """For each context the node that it ends in. Equal contexts end in one node."""
    ends: list[Prefix | None] = [None] * len(contexts)
    roots: list[Prefix] = []
    last: Prefix | None = None
    before = np.empty(0, dtype=np.int64)
    for i in sorted(range(len(contexts)), key=lambda i: list(contexts[i])):
        ids = np.array(contexts[i], dtype=np.int64)
        parent = _branch(last, _common(before, ids), roots)
        at = 0 if parent is None else parent.stop
        if at < len(ids) or parent is None:
            node = Prefix(parent, at, ids[at:].tolist())
            (roots if parent is None else parent.children).append(node)
            parent = node
        ends[i], last, before = parent, parent, ids
    found = [end for end in ends if end is not None]
    for node in (node for end in found for node in end.path()):
        node.below += 1
    stack, number = roots[::-1], 0
    while stack:
        node = stack.pop()
        node.number, number = number, number + 1
        stack += node.children[::-1]
    return found


def _common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size


def _branch(last: Prefix | None, shared: int, roots: list[Prefix]) -> Prefix | None:
    """The node that ends where the next context leaves the last one, whose first `shared` tokens it has: one is cut in
    two for it. None if it has too little in common with any.
    """
    node = last
    while node is not None and shared < node.stop:
        if shared - node.position < LEAST:
            node = node.parent
            continue
        upper = Prefix(node.parent, node.position, node.ids[: shared - node.position], [node])
        (roots if node.parent is None else node.parent.children)[-1] = upper
        node.parent, node.position, node.ids = upper, shared, node.ids[shared - node.position :]
        return upper
    return node
