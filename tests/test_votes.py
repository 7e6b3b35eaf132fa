"""Votes, slices and orders against loops, and intervals against the estimated quantities."""

import itertools
import math

import numpy as np
import pytest
from verdicts import judged_row, preference

from dwrl_fast.evaluation.judged import Judged
from dwrl_fast.evaluation.report import orders
from dwrl_fast.evaluation.table import PairTable, length_bins, partitions, slice_of
from dwrl_fast.evaluation.units import Units, bootstrap_interval
from dwrl_fast.evaluation.votes import VotePoint, vote_curve

PLACES = [(0, 1), (1, 0)]


def sign(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


def points(found: list[VotePoint], by: str) -> dict[int, float]:
    return {point.votes: point.accuracy for point in found if point.by == by}


def test_one_vote_is_the_share_of_all_pairs_of_thoughts_and_all_are_the_score() -> None:
    rng = np.random.default_rng(0)
    rows, alone, together = [], [], []
    for _ in range(400):
        better, worse = (rng.normal(size=8) + 0.3).tolist(), rng.normal(size=8).tolist()
        rows.append(judged_row([0.0, 0.0], verdicts=[better, worse]))
        alone.append(np.mean([sign(a, b) for a, b in itertools.product(better, worse)]))
        together.append(sign(np.logaddexp.reduce(better), np.logaddexp.reduce(worse)))
    found = vote_curve(rows, "score", [1, 4, 8], seed=0)
    # With 400 rows of 64 draws each, the error of the draws is below 0.004.
    assert points(found, "mean")[1] == pytest.approx(np.mean(alone), abs=0.012)
    assert points(found, "majority")[1] == pytest.approx(np.mean(alone), abs=0.012)
    assert points(found, "mean")[8] == np.mean(together)
    assert points(found, "mean")[1] < points(found, "mean")[4] < points(found, "mean")[8]
    assert all(point.low < point.accuracy < point.high for point in found)
    assert [point.votes for point in vote_curve(rows, "score", [1, 16], seed=0)] == [1, 1], "no more than there are"


def test_a_few_confident_thoughts_weigh_more_in_the_mean_than_in_the_majority() -> None:
    row = judged_row([0.0, 0.0], verdicts=[[-9.0, -9.0, -9.0, -0.1], [-8.0, -8.0, -8.0, -8.0]])
    found = vote_curve([row], "score", [4], seed=0)
    assert (points(found, "mean")[4], points(found, "majority")[4]) == (1, 0)


def test_verdicts_of_comparisons() -> None:
    """Three thoughts per order, with the better response first, then second. None is unreadable and counts as wrong."""

    def majority(*verdicts: list[float | None]) -> float:
        row = judged_row([0.0, 0.0], verdicts=list(verdicts), comparisons=PLACES)
        return points(vote_curve([row], "comparison", [3], seed=0), "majority")[3]

    assert majority([1, 1, 0], [0, 0, 1]) == 1
    assert majority([1, 1, 1], [1, 1, 1]) == 0.5
    assert majority([1, 0, None], [0, 1, None]) == 0
    assert majority([1, 1, None], [0, None, 1]) == 0.5
    shown = list(itertools.permutations(range(3), 2))
    verdicts = [[1], [1], [0], [None], [0], [None]]
    ranking = judged_row([0.0] * 3, (1, 2, 2), comparisons=shown, verdicts=verdicts)
    assert points(vote_curve([ranking], "comparison", [1], seed=0), "majority")[1] == 1


def test_numbers_in_text() -> None:
    row = judged_row([0.0, 0.0], verdicts=[[8, None, 6], [7, 7, 7]])
    found = vote_curve([row], "number", [3], seed=0)
    assert points(found, "mean")[3] == 0.5, "7 against 7"
    assert points(found, "majority")[3] == 0, "one for, one against, one unread"
    unread = judged_row([0.0, 0.0], verdicts=[[None], [3.0]])
    assert points(vote_curve([unread], "number", [1], seed=0), "mean")[1] == 0


def test_rows_without_an_order_are_left_out() -> None:
    rows = [judged_row([1.0, 0.0]), judged_row([0.0, 1.0], (1, 1))]
    assert vote_curve(rows, "score", [1], seed=0)[0].accuracy == 1


def test_orders_by_hand() -> None:
    def row(first: list[float | None], second: list[float | None]) -> Judged:
        return judged_row([0.0, 0.0], verdicts=[first, second], comparisons=PLACES)

    found = orders([row([0.9], [0.2]), row([0.7], [0.6]), row([0.5], [0.9]), row([None], [0.0])], Units.alone(4))
    assert found is not None
    assert found.better_first == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert found.better_second == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert found.agree == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert orders([judged_row([1.0, 0.0])], Units.alone(1)) is None


def test_slices_against_loops() -> None:
    rng = np.random.default_rng(1)
    judged, rows = [], []
    for place in range(60):
        k = int(rng.integers(2, 4))
        subset = [None, "a", "b"][place % 3]
        judged.append(judged_row(rng.integers(0, 4, k).astype(float).tolist(), subset=subset))
        sizes = rng.integers(1, 50, k)
        turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}) * (place % 7)
        rows.append(
            preference(
                responses=tuple("x" * int(size) for size in sizes),
                prompt=(*turns, {"role": "user", "content": "?"}),
                source=f"{'one' if place < 20 else 'two'}.jsonl:{place}",
            )
        )
    table = PairTable.of(judged, rows, Units.of(rows))
    found = {each.by: each.slices(table, 0) for each in partitions(table, judged, rows)}
    assert list(found) == ["source", "subset", "turns", "length"]
    assert [part.name for part in found["source"]] == ["one", "two"]
    assert [part.name for part in found["turns"]] == ["1", "2", "3", "4", "5 or more"]
    assert sum(part.rows for part in found["turns"]) == 60 == sum(part.rows for part in found["source"])
    for name in "ab":
        credits, longer = [], []
        for one, row in zip(judged, rows, strict=True):
            if one.subset == name:
                pairs = list(itertools.combinations(range(len(one.scores)), 2))
                credits.append(np.mean([sign(one.scores[i], one.scores[j]) for i, j in pairs]))
                longer.append(np.mean([sign(len(row.responses[i]), len(row.responses[j])) for i, j in pairs]))
        part = next(part for part in found["subset"] if part.name == name)
        assert part.accuracy == pytest.approx(np.mean(credits)) and part.longer_wins == pytest.approx(np.mean(longer))
        assert part.low < part.accuracy < part.high
    for part in found["length"]:
        low, _, high = part.name.partition(" to ")
        some = (table.longer >= int(low)) & (table.longer <= int(high))
        assert part.pairs == some.sum() and slice_of("", table, some, 0).accuracy == part.accuracy
    assert sum(part.pairs for part in found["length"]) == len(table.gap)


@pytest.mark.parametrize(
    ("longer", "names"),
    [
        ([3, 3, 3], ["+3 to +3"]),
        ([-1, 2], ["-1 to -1", "+2 to +2"]),
        (list(range(10)), ["+0 to +1", "+2 to +3", "+4 to +5", "+6 to +6", "+7 to +9"]),
    ],
)
def test_bins_of_length_hold_about_equally_many(longer: list[int], names: list[str]) -> None:
    found = length_bins(np.array(longer))
    assert len(found.place) == len(longer) and found.place.max() == len(found.names) - 1
    assert found.names[0].startswith(names[0].split()[0]) and found.names[-1].endswith(names[-1].split()[-1])
    assert all((found.place == place).any() for place in range(len(found.names)))


def test_the_interval_of_a_weighted_mean_covers_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        weights = rng.choice([0.2, 1.0], 120)
        values = (rng.random(120) < 0.7).astype(float)
        low, high = bootstrap_interval(values, 0, weights)
        held += low <= 0.7 <= high
    assert 88 <= held <= 99, "of 100 intervals of 95 %"
    values = rng.random(50)
    assert bootstrap_interval(values, 3, np.full(50, 0.5)) == pytest.approx(bootstrap_interval(values, 3), abs=1e-12)
    assert not math.isclose(bootstrap_interval(values, 3, rng.random(50))[0], bootstrap_interval(values, 3)[0])
