"""Groups of sequences, and the tensors of one micro-batch.

A `Group` is one preference group after encoding: K responses with N sequences each. It is atomic: its weights need
every thought of every response, so a micro-batch holds whole groups only. `PaddedBatch` lays the sequences out one a
row, padded on the right, and names the rows of the hidden states that the head needs: the positions that predict
thought tokens, and the last token of each sequence, where the score is read. Everything after the backbone sees only
those rows, never the layout.

Shapes: P groups, K responses, N thoughts, S sequences, L longest sequence, T thought tokens of the micro-batch.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Sequence
from dwrl_fast.log import warn_once


@dataclass(slots=True)
class Group:
    """One encoded preference group.

    sequences: K lists of N sequences.
    old_logprobs: K lists of N float32 tensors [|o|], the sampling policy's; empty where nothing is sampled.
    ended: K lists of N flags: whether the thought closed itself within the limit.
    scores: K lists of N scores in nats, as last computed (for the log of thoughts).
    """

    preference: Preference
    sequences: list[list[Sequence]]
    old_logprobs: list[list[Tensor]] = field(default_factory=list)
    ended: list[list[bool]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)

    @property
    def flat(self) -> list[Sequence]:
        return [sequence for response in self.sequences for sequence in response]

    @property
    def longest(self) -> int:
        return max(len(sequence.ids) for sequence in self.flat)


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """The tensors of one micro-batch.

    input_ids, attention_mask: [S, L].
    score_rows: [S], indices into the flattened [S * L] positions: the last token of each sequence.
    token_rows: [T], likewise: the positions whose hidden state predicts a thought token.
    targets: [T], the thought tokens.  owner: [T], the sequence of each.  lengths: [S], |o| of each sequence.
    trained: [S] bool, whether the thought's tokens are trained.
    old_logprob: [T] float32, or None.
    slots: [P, K, N], the sequence of each thought; valid: [P, K, N] bool, False where a response has fewer thoughts, or
    a group fewer responses, than the largest of the batch.
    """

    groups: tuple[Group, ...]
    input_ids: Tensor
    attention_mask: Tensor
    score_rows: Tensor
    token_rows: Tensor
    targets: Tensor
    owner: Tensor
    lengths: Tensor
    trained: Tensor
    old_logprob: Tensor | None
    slots: Tensor
    valid: Tensor

    def grid(self, values: Tensor) -> Tensor:
        """[S] -> [P, K, N]; absent slots repeat the first sequence and must be masked with `valid`."""
        return values[self.slots]


def pad_batch(groups: Seq[Group], pad_id: int, device: torch.device, *, mask_truncated: bool = False) -> PaddedBatch:
    """Lay `groups` out one sequence a row. With `mask_truncated`, thoughts cut at the limit are scored, not trained."""
    sequences = [sequence for group in groups for sequence in group.flat]
    ended = [e for group in groups for response in group.ended for e in response] or [True] * len(sequences)
    longest = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    token_rows, targets, lengths = [], [], []
    for s, sequence in enumerate(sequences):
        size = len(sequence.ids)
        ids = torch.tensor(sequence.ids)
        input_ids[s, :size] = ids
        attention_mask[s, :size] = 1
        start, stop = sequence.thought.start, sequence.thought.stop
        token_rows.append(torch.arange(start - 1, stop - 1) + s * longest)
        targets.append(ids[start:stop])
        lengths.append(stop - start)
    sizes = torch.tensor([len(sequence.ids) for sequence in sequences])
    old = [logprob for group in groups for response in group.old_logprobs for logprob in response]
    slots, valid = _slots(groups)
    n_tokens = torch.tensor(lengths)
    trained = torch.tensor(ended) if mask_truncated else torch.ones(len(sequences), dtype=torch.bool)

    def put(x: Tensor) -> Tensor:
        return x.to(device)

    return PaddedBatch(
        groups=tuple(groups),
        input_ids=put(input_ids),
        attention_mask=put(attention_mask),
        score_rows=put(torch.arange(len(sequences)) * longest + sizes - 1),
        token_rows=put(torch.cat(token_rows)),
        targets=put(torch.cat(targets)),
        owner=put(torch.repeat_interleave(torch.arange(len(sequences)), n_tokens)),
        lengths=put(n_tokens),
        trained=put(trained),
        old_logprob=put(torch.cat(old)) if old else None,
        slots=put(slots),
        valid=put(valid),
    )


def _slots(groups: Seq[Group]) -> tuple[Tensor, Tensor]:
    responses = max(len(group.sequences) for group in groups)
    thoughts = max(len(response) for group in groups for response in group.sequences)
    slots = torch.full((len(groups), responses, thoughts), -1)
    s = 0
    for p, group in enumerate(groups):
        for k, response in enumerate(group.sequences):
            slots[p, k, : len(response)] = torch.arange(s, s + len(response))
            s += len(response)
    return slots.clamp_min(0), slots >= 0


def split_by_budget(groups: Seq[Group], token_budget: int) -> list[list[Group]]:
    """Whole groups into micro-batches of at most `token_budget` tokens, padding included, the longest first.

    A group larger than the budget is a batch of its own: cutting it would change its weights.
    """
    batches: list[list[Group]] = []
    rows = longest = 0
    for group in sorted(groups, key=lambda g: g.longest, reverse=True):
        size = len(group.flat)
        if size * group.longest > token_budget:
            warn_once(
                f"a preference group of {size} sequences up to {group.longest} tokens long exceeds --token_budget "
                f"{token_budget}; groups are never split, so it becomes a micro-batch of its own. Raise the budget, or "
                "lower --max_length, --max_completion_length or --num_generations if memory runs out."
            )
        if not batches or (rows + size) * longest > token_budget:
            batches.append([])
            rows, longest = 0, group.longest
        batches[-1].append(group)
        rows += size
    return batches
