"""The prefix tree of contexts: every run of tokens that several contexts share is one node."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LEAST = 16  # minimum tokens of a shared run; for fewer, a separate tile costs more than it saves


@dataclass(eq=False, slots=True)
class Prefix:
    """A run of tokens of one or several contexts, from `position` on, after the tokens of `parent`.

    number: its index in depth-first order. below: the number of contexts that end here or in descendants.
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
        """The nodes from the root to this one."""
        found: list[Prefix] = []
        node: Prefix | None = self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


def prefix_tree(contexts: Sequence[Sequence[int]]) -> list[Prefix]:
    """For each context, the node in which it ends. Equal contexts end in the same node."""
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
    """The node that ends after the first `shared` tokens, which the next context shares with the last one. If
    necessary, a node is split there. None if the shared part is too short.
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
