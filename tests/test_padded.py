"""The padded layout, computed by hand: positions of tokens, padding, and the division of groups into micro-batches."""

import pytest
import torch
from drawn_groups import make_group, make_sequence, whole

from dwrl_fast import log
from dwrl_fast.batching.padded import padded_batch, split_padded

CPU = torch.device("cpu")


def test_sequences_lie_one_a_row() -> None:
    group = make_group([[make_sequence([1, 2, 3], 1, 2)], [make_sequence([4, 5, 6, 7], 1, 3)]])
    batch = padded_batch([group], 9, CPU)
    assert batch.input_ids.tolist() == [[1, 2, 3, 9], [4, 5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert (batch.trunk_tokens, batch.naive_tokens, batch.padding) == (8, 7, 1)
    assert batch.score_rows.tolist() == [2, 7]
    assert batch.token_rows.tolist() == [0, 4, 5] and batch.targets.tolist() == [2, 5, 6]
    assert batch.lengths.tolist() == [1, 2] and batch.segment_ids.tolist() == [0, 1, 1]


def test_absent_thoughts_repeat_the_first_sequence_and_are_not_valid() -> None:
    groups = [whole([1, 2], [1, 3]), make_group([[make_sequence([1, 4], 1, 2)], [make_sequence([1, 5], 1, 2)]])]
    batch = padded_batch(groups, 9, CPU)
    assert batch.slots.tolist() == [[[0, 1], [0, 0]], [[2, 0], [3, 0]]]
    assert batch.valid.tolist() == [[[True, True], [False, False]], [[True, False], [True, False]]]
    assert batch.places.tolist() == [0, 1, 4, 6]
    values = torch.tensor([5.0, 6.0, 7.0, 8.0])
    assert torch.equal(batch.flat(batch.grid(values)), values)
    assert batch.by_sequence("abcd") == [[["a", "b"]], [["c"], ["d"]]]
    assert batch.by_token(values) == [[[[5.0], [6.0]]], [[[7.0]], [[8.0]]]]


def test_thoughts_that_were_cut_are_trained_unless_masked() -> None:
    group = whole([1, 2, 3], [1, 4])  # the first one was truncated
    assert padded_batch([group], 9, CPU).trained.tolist() == [True, True]
    assert padded_batch([group], 9, CPU, mask_truncated=True).trained.tolist() == [False, True]


def test_without_log_probs_of_every_token_there_are_none() -> None:
    group = whole([1, 2, 3], [1, 4])
    assert padded_batch([group], 9, CPU).old_logprob is not None
    few: list[list[list[list[float]]]] = [[[[], []]], [[[-1.0], [-2.0]]]]
    for logprobs in few:
        assert padded_batch([group.with_logprobs(logprobs)], 9, CPU).old_logprob is None


@pytest.mark.parametrize(
    ("budget", "expected"), [(20, [[5, 4, 3]]), (19, [[5, 4], [3]]), (15, [[5, 4], [3]]), (14, [[5], [4, 3]])]
)
def test_a_micro_batch_holds_its_budget_with_padding(budget: int, expected: list[list[int]]) -> None:
    """Two sequences of 5 tokens, one of 4 and one of 3. All are padded to the longest in their batch."""
    groups = [whole([1, 2, 3]), whole([1] * 5, [2] * 5), whole([1] * 4)]
    assert [[group.longest for group in batch] for batch in split_padded(groups, budget)] == expected


@pytest.mark.parametrize(("budget", "said"), [(10, []), (9, ["a preference group exceeds --token_budget 9"])])
def test_a_group_beyond_the_budget_is_said(caplog: pytest.LogCaptureFixture, budget: int, said: list[str]) -> None:
    log.warn_once.cache_clear()
    groups = [whole([1] * 5, [2] * 5), whole([3])]
    assert [[group.longest for group in batch] for batch in split_padded(groups, budget)] == [[5], [1]]
    assert [record.getMessage().partition("; ")[0] for record in caplog.records] == said
