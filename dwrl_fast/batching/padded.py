"""The padded layout: one sequence per row, padded on the right to the longest.

L: the longest sequence; the other shapes are those of batch.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Flat, head_fields, warn_oversized
from dwrl_fast.encode import Group
from dwrl_fast.ops.tiles import ranges


@dataclass(frozen=True, slots=True)
class PaddedBatch(Batch):
    """One sequence per row: input_ids and attention_mask are [S, L]."""

    attention_mask: Tensor

    @property
    def padding(self) -> int:
        return self.trunk_tokens - self.naive_tokens


def padded_batch(
    groups: Sequence[Group], pad_id: int, device: torch.device, *, mask_truncated: bool = False
) -> PaddedBatch:
    """Lay `groups` out one sequence per row. With `mask_truncated`, thoughts cut at the limit are scored but not
    trained.
    """
    flat = Flat.of(groups)
    shape = len(flat.sizes), int(flat.sizes.max())
    rows = ranges(np.arange(shape[0]) * shape[1], flat.sizes)
    input_ids, attention_mask = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64)
    input_ids.flat[rows], attention_mask.flat[rows] = flat.ids, 1
    return PaddedBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(attention_mask).to(device),
        **head_fields(groups, flat, rows, device, mask_truncated=mask_truncated),
    )


def padded_sizes(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """For each group alone: its positions, and its pairs of positions of which one attends to the other."""
    shapes = [(len(group.flat), group.longest) for group in groups]
    return [(size * longest, size * longest * (longest + 1) // 2) for size, longest in shapes]


def split_padded(groups: Sequence[Group], token_budget: int) -> list[list[Group]]:
    """Whole groups into micro-batches of at most `token_budget` tokens, padding included, the longest first.

    A group larger than the budget becomes a batch of its own, because splitting it would change its weights.
    """
    batches: list[list[Group]] = []
    rows = longest = 0
    for group in sorted(groups, key=lambda g: g.longest, reverse=True):
        size = len(group.flat)
        if size * group.longest > token_budget:
            warn_oversized(token_budget)
        if not batches or (rows + size) * longest > token_budget:
            batches.append([])
            rows, longest = 0, group.longest
        batches[-1].append(group)
        rows += size
    return batches
