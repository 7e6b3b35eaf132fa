"""The tensors of one micro-batch.

A group is never split: its weights need every thought of every response, so a micro-batch holds whole groups. A `Batch`
lists the rows of the hidden states that the head needs: the positions that predict thought tokens, and the last token
of each sequence, where the score is read. Everything after the backbone uses only these rows and does not depend on the
layout (padded.py or tree.py).

Shapes: P groups, K responses, N thoughts, S sequences, F tokens of all sequences, T thought tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode.group import Group
from dwrl_fast.log import warn_once
from dwrl_fast.ops.tiles import ranges

Ints = NDArray[np.int64]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Batch:
    """The fields that every layout provides for everything after the backbone.

    input_ids: the tokens as laid out; rows below are indices into its flattened positions.
    score_rows: [S], the last token of each sequence.
    token_rows: [T], the positions whose hidden state predicts a thought token.
    targets: [T], the thought tokens.  segment_ids: [T], the sequence of each.  lengths: [S], |o| of each sequence.
    trained: [S] bool, whether the thought's tokens are trained.
    old_logprob: [T] float32, or None.
    slots: [P, K, N], the sequence of each thought; valid: [P, K, N] bool, False where a response has fewer thoughts, or
    a group fewer responses, than the largest of the batch.
    places: [S], the index of each sequence in the flattened slots.
    naive_tokens: F, the tokens that the backbone would compute without sharing.
    """

    groups: tuple[Group, ...]
    input_ids: Tensor
    score_rows: Tensor
    token_rows: Tensor
    targets: Tensor
    segment_ids: Tensor
    lengths: Tensor
    trained: Tensor
    old_logprob: Tensor | None
    slots: Tensor
    valid: Tensor
    places: Tensor
    naive_tokens: int

    def grid(self, values: Tensor) -> Tensor:
        """[S] -> [P, K, N]; absent slots repeat the first sequence and must be masked with `valid`."""
        return values[self.slots]

    def flat(self, grid: Tensor) -> Tensor:
        """[P, K, N] -> [S], the entry of `grid` for each sequence."""
        return grid.flatten()[self.places]

    def by_sequence(self, values: Iterable[Value]) -> list[list[list[Value]]]:
        """`values`, one per sequence [S], as K lists of N for each group."""
        left = iter(values)
        return [[[next(left) for _ in some] for some in group.sequences] for group in self.groups]

    def by_token(self, values: Tensor) -> list[list[list[list[float]]]]:
        """The same for `values` [T]: each sequence has a list."""
        return self.by_sequence(part.tolist() for part in values.cpu().split(self.lengths.tolist()))

    @property
    def trunk_tokens(self) -> int:
        """Positions that the backbone computes, padding included."""
        return self.input_ids.numel()

    @property
    def head_rows(self) -> int:
        """Hidden states that the head reads, thoughts and scores."""
        return len(self.token_rows) + len(self.score_rows)

    @property
    def padding(self) -> int:
        """Positions that hold padding."""
        return 0


class Size(NamedTuple):
    """The size of a whole minibatch, which its loss is divided by: preference groups, sequences, thought tokens,
    trained labels.
    """

    groups: int
    sequences: int
    tokens: int
    labels: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Size":
        """The size of all groups of the minibatch, on all ranks."""
        flat = [sequence for group in groups for sequence in group.flat]
        return cls(
            len(groups),
            len(flat),
            sum(one.thought.stop - one.thought.start for one in flat),
            sum(len(group.labels) for group in groups),
        )


@dataclass(frozen=True, slots=True)
class Flat:
    """All sequences end to end, the input of every layout: ids [F], and start and size of each sequence, [S]."""

    sequences: list[TokenSequence]
    ids: Ints
    starts: Ints
    sizes: Ints

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Flat":
        """The sequences of `groups`, group by group."""
        sequences = [sequence for group in groups for sequence in group.flat]
        sizes = np.array([len(sequence.ids) for sequence in sequences], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(s.ids for s in sequences), np.int64, count=int(sizes.sum()))
        return cls(sequences, ids, np.cumsum(sizes) - sizes, sizes)


def head_fields(
    groups: Sequence[Group], flat: Flat, rows: Ints, device: torch.device, *, mask_truncated: bool
) -> dict[str, Any]:
    """The fields of `Batch` except the tokens, for a layout that stores the tokens of `flat` at `rows` [F]."""
    count = len(flat.sequences)
    lengths = np.array([s.thought.stop - s.thought.start for s in flat.sequences], dtype=np.int64)
    targets = ranges(flat.starts + np.array([s.thought.start for s in flat.sequences], dtype=np.int64), lengths)
    thoughts = [thought for group in groups for some in group.thoughts for thought in some]
    ended = [thought.ended for thought in thoughts] or [True] * count
    old = np.fromiter(chain.from_iterable(thought.logprobs for thought in thoughts), np.float32)
    slots, valid = _slots(groups)

    def put(x: NDArray[Any]) -> Tensor:
        return torch.from_numpy(x).to(device)

    return {
        "groups": tuple(groups),
        "score_rows": put(rows[flat.starts + flat.sizes - 1]),
        "token_rows": put(rows[targets - 1]),
        "targets": put(flat.ids[targets]),
        "segment_ids": put(np.repeat(np.arange(count), lengths)),
        "lengths": put(lengths),
        "trained": put(np.array(ended if mask_truncated else [True] * count)),
        "old_logprob": put(old) if thoughts and len(old) == len(targets) else None,
        "slots": put(slots),
        "valid": put(valid),
        "places": put(np.flatnonzero(valid)),
        "naive_tokens": len(flat.ids),
    }


def _slots(groups: Sequence[Group]) -> tuple[Ints, NDArray[np.bool_]]:
    responses = max(len(group.sequences) for group in groups)
    thoughts = max(len(response) for group in groups for response in group.sequences)
    slots = np.full((len(groups), responses, thoughts), -1)
    s = 0
    for p, group in enumerate(groups):
        for k, response in enumerate(group.sequences):
            slots[p, k, : len(response)] = np.arange(s, s + len(response))
            s += len(response)
    return slots.clip(0), slots >= 0


def warn_oversized(token_budget: int) -> None:
    """Warn, once, that a group is larger than the token budget."""
    warn_once(
        f"a preference group exceeds --token_budget {token_budget}; groups are never split, so each such group becomes "
        "a micro-batch of its own. Raise the budget, or lower --max_length, --max_completion_length or "
        "--num_generations if memory runs out."
    )
