"""Pair accuracy against loops over groups and pairs, and its interval against the estimated quantity."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwrl_fast.errors import DataError
from dwrl_fast.evaluation.pairs import pair_report
from dwrl_fast.objectives.agreement import order_accuracy, rank_grid

PAIR = (1, 2)
quick = settings(max_examples=60, deadline=None, derandomize=True)
groups_of_ranks = st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=5).map(sorted), min_size=1, max_size=6)


def test_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]])
    found = pair_report(scores, [PAIR] * 4)
    assert (found.accuracy, found.ties, found.groups, found.tied) == (2.5 / 4, 1, 4, 0)
    assert 0 <= found.low < found.accuracy < found.high <= 1
    gaps = torch.tensor([1.0, -1.0, 0.0, 2.0])
    assert found.nll == pytest.approx(torch.nn.functional.softplus(-gaps).mean().item())
    assert found.margin == pytest.approx(0.5) and str(found).endswith(", margin 0.500")
    unknown = pair_report(scores - torch.tensor([[0.0, math.inf], *[[0.0, 0.0]] * 3]), [PAIR] * 4)
    assert math.isnan(unknown.margin) and "margin" not in str(unknown)
    assert pair_report(-scores, [PAIR] * 4).clipped == 0.5 > pair_report(-scores, [PAIR] * 4).accuracy


def test_a_group_counts_the_mean_over_its_pairs() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 0.0, torch.nan]])
    assert pair_report(scores, [(1, 2, 3), PAIR]).accuracy == pytest.approx((2 / 3 + 1) / 2)


def test_responses_that_tie_in_the_data_are_not_compared() -> None:
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, torch.nan]])
    found = pair_report(scores, [(1, 2, 2), (1, 1)])
    assert (found.accuracy, found.groups, found.tied, found.ties) == (0.5, 1, 1, 0)
    assert "1 left out whose responses all tie" in str(found)
    assert "tie" not in str(pair_report(scores[:1], [(1, 2, 3)]))
    with pytest.raises(DataError, match="every row tie"):
        pair_report(scores[1:, :2], [(1, 1)])


@quick
@given(groups_of_ranks, st.integers(0, 2**31))
def test_against_loops(ranks: list[list[int]], seed: int) -> None:
    ranks = [[1 + sorted(set(one)).index(rank) for rank in one] for one in ranks]
    rng = np.random.default_rng(seed)
    width = max(map(len, ranks))
    rows = [[*rng.integers(-3, 3, len(one)).astype(float), *[math.nan] * (width - len(one))] for one in ranks]
    shares, costs, leads, even = [], [], [], 0
    for row, one in zip(rows, ranks, strict=True):
        gaps = [row[i] - row[j] for i, j in combinations(range(len(one)), 2) if one[i] < one[j]]
        even += gaps.count(0)
        if gaps:
            shares.append(sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps))
            costs.append(sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps))
            leads.append(sum(gaps) / len(gaps))
    scores = torch.tensor(rows, dtype=torch.float64)
    assert order_accuracy(scores, rank_grid(ranks)).tolist() == pytest.approx(shares)
    if shares:
        found = pair_report(scores, ranks, seed)
        assert found.accuracy == pytest.approx(np.mean(shares)) and found.nll == pytest.approx(np.mean(costs))
        assert found.margin == pytest.approx(np.mean(leads), abs=1e-12)
        assert (found.ties, found.groups, found.tied) == (even, len(shares), len(ranks) - len(shares))


def test_the_interval_is_over_groups() -> None:
    """Rankings that are completely right or wrong have the same interval as that many pairs, although each ranking has
    ten pairs.
    """
    right = torch.arange(60) % 3 > 0
    pairs = torch.where(right[:, None], torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    rankings = torch.where(right[:, None], torch.arange(5.0).flip(0), torch.arange(5.0))
    one, other = pair_report(pairs, [PAIR] * 60), pair_report(rankings, [(1, 2, 3, 4, 5)] * 60)
    assert (one.accuracy, one.low, one.high) == (other.accuracy, other.low, other.high)


def test_the_interval_covers_as_it_says() -> None:
    """For 200 binomial samples, about 95 of 100 of the 95 % intervals contain the true value."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        right = (torch.rand(150, generator=generator) < 0.7).double()
        found = pair_report(torch.stack([right, torch.full_like(right, 0.5)], -1), [PAIR] * 150)
        held += found.low <= 0.7 <= found.high
    assert 180 <= held <= 199


@pytest.mark.parametrize(
    ("scores", "ranks", "message"),
    [
        (torch.zeros(0, 2), [], "no pair to evaluate"),
        (torch.tensor([[1.0, torch.nan]]), [PAIR], "not a number"),
        (torch.tensor([[1.0, 0.0, torch.nan], [1.0, 0.0, -1.0]]), [(1, 2, 3)] * 2, "not a number"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error(scores: torch.Tensor, ranks: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pair_report(scores, ranks)
