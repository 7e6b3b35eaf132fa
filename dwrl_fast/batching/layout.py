"""How groups become micro-batches: `tree` (shared prefixes once), `packed` (end to end) or `padded` (one a row)."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.padded import padded_batch, split_padded
from dwrl_fast.batching.tree import split_tree, tree_batch
from dwrl_fast.encode import Group

Packing = Literal["tree", "packed", "padded"]
_COUNTING = threading.Lock()  # an addition to a Counter is two steps


@dataclass(frozen=True, slots=True)
class Layout:
    """One packing, and how much of it goes into a forward pass.

    token_budget: positions of a micro-batch, padding included. mask_truncated: thoughts cut at the limit are scored,
    not trained. tokens: what it has laid out so far, `computed`, and what would have been `naive`, one sequence at a
    time with nothing shared.
    """

    packing: Packing
    token_budget: int
    pad_id: int
    device: torch.device
    mask_truncated: bool = False
    tokens: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    def batches(self, groups: Sequence[Group]) -> list[Batch]:
        """`groups` in micro-batches of whole groups, in an order of the layout's own."""
        found = self._batches(groups)
        self.count(sum(batch.trunk_tokens for batch in found), sum(batch.naive_tokens for batch in found))
        return found

    def count(self, computed: int, naive: int) -> None:
        """Add to `tokens`, from any thread."""
        with _COUNTING:
            self.tokens["computed"] += computed
            self.tokens["naive"] += naive

    def _batches(self, groups: Sequence[Group]) -> list[Batch]:
        if self.packing == "padded":
            return [
                padded_batch(micro, self.pad_id, self.device, mask_truncated=self.mask_truncated)
                for micro in split_padded(groups, self.token_budget)
            ]
        shared = self.packing == "tree"
        return [
            tree_batch(micro, self.device, shared=shared, mask_truncated=self.mask_truncated)
            for micro in split_tree(groups, self.token_budget, shared=shared)
        ]
