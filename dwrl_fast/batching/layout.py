"""How groups become micro-batches: `tree` (shared prefixes once), `packed` (end to end) or `padded` (one a row)."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dwrl_fast.batching.balance import BY_TOKENS, Cost, balanced
from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.padded import padded_batch, padded_sizes, split_padded
from dwrl_fast.batching.tree import split_tree, tree_batch, tree_sizes
from dwrl_fast.data import Preference
from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode import Group

Packing = Literal["tree", "packed", "padded"]
_COUNTING = threading.Lock()  # adding to a Counter is not atomic


@dataclass(frozen=True, slots=True)
class Layout:
    """One packing and its token budget.

    token_budget: maximum positions of a micro-batch, padding included. mask_truncated: thoughts cut at the limit are
    scored but not trained. cost: the cost model for sharing work among ranks. tokens: counts of positions laid out so
    far: `computed`, and `naive` (without sharing).
    """

    packing: Packing
    token_budget: int
    pad_id: int
    device: torch.device
    mask_truncated: bool = False
    cost: Cost = BY_TOKENS
    tokens: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    def batches(self, groups: Sequence[Group]) -> list[Batch]:
        """`groups` in micro-batches of whole groups. The layout chooses the order."""
        ((_, micro),) = self.split(groups, 1)
        return self.laid_out(micro)

    def split(self, groups: Sequence[Group], ranks: int) -> list[tuple[list[int], list[list[Group]]]]:
        """For each of `ranks`, the indices of its share of `groups`, and the share as micro-batches. All shares have
        about the same `cost`.
        """
        sizes = padded_sizes(groups) if self.packing == "padded" else tree_sizes(groups, shared=self.packing == "tree")
        tokens, pairs = [size for size, _ in sizes], [pair for _, pair in sizes]
        places = balanced(self.cost.of(groups, tokens, pairs), ranks)
        return [(own, self._micro([groups[i] for i in own], [tokens[i] for i in own])) for own in places]

    def _micro(self, groups: list[Group], tokens: list[int]) -> list[list[Group]]:
        if self.packing == "padded":
            return split_padded(groups, self.token_budget)
        return split_tree(groups, tokens, self.token_budget)

    def laid_out(self, micro: Sequence[Sequence[Group]]) -> list[Batch]:
        """The tensors of these micro-batches."""
        found = [self._batch(groups) for groups in micro]
        self.count(sum(batch.trunk_tokens for batch in found), sum(batch.naive_tokens for batch in found))
        return found

    def idle(self) -> Batch:
        """A batch without groups, over two tokens, for a rank that has no groups but must take part in a collective
        pass.
        """
        none = slice(0)
        sequence = TokenSequence([0, 0], none, none, slice(1, 2), none)
        return dataclasses.replace(self._batch([Group(Preference((), ("",)), [[sequence]])]), groups=())

    def count(self, computed: int, naive: int) -> None:
        """Add to `tokens`; thread-safe."""
        with _COUNTING:
            self.tokens["computed"] += computed
            self.tokens["naive"] += naive

    def _batch(self, groups: Sequence[Group]) -> Batch:
        if self.packing == "padded":
            return padded_batch(groups, self.pad_id, self.device, mask_truncated=self.mask_truncated)
        shared = self.packing == "tree"
        return tree_batch(groups, self.device, shared=shared, mask_truncated=self.mask_truncated)
