"""Prediction intervals of further runs: their coverage, and the report on a run outside them."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("scipy", reason="scipy is not installed")
from bench.learning.embedded_seeds import compared
from bench.learning.intervals import comparison, next_mean, next_share

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def test_a_further_mean_lies_in_its_interval_as_often_as_claimed() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for stored, further in zip(rng.normal(3, 2, (4000, 4)), rng.normal(3, 2, (4000, 2)), strict=True):
        low, high = next_mean(stored.tolist(), 2)
        inside += low <= further.mean() <= high
    assert inside / 4000 == pytest.approx(0.95, abs=0.012)


def test_a_further_share_lies_in_its_interval_at_least_as_often_as_claimed() -> None:
    rng = np.random.default_rng(0)
    rates = rng.beta(0.5, 0.5, 4000)
    stored, further = rng.binomial(32, rates) / 32, rng.binomial(32, rates) / 32
    intervals = {share: next_share(share, 32) for share in set(stored.tolist())}
    found = [intervals[one][0] <= other <= intervals[one][1] for one, other in zip(stored, further, strict=True)]
    assert 0.95 <= np.mean(found) <= 0.99


def test_a_perfect_run_leaves_room_below() -> None:
    low, high = next_share(1.0, 32)
    assert (0.85 < low < 1.0, high) == (True, 1.0)


def shown(table: object) -> str:
    console = Console(width=120, record=True)
    console.print(table)
    return console.export_text()


def test_what_lies_outside_is_said() -> None:
    text = shown(comparison("title", [("one", 0.5, 0.6, (0.4, 0.6)), ("other", 0.5, 0.61, (0.4, 0.6))]))
    lines = [line for line in text.splitlines() if "one" in line or "other" in line]
    assert ["within" in line for line in lines] == [True, False] and "OUTSIDE" in lines[1]


def test_stored_seeds_compare_with_themselves() -> None:
    stored = json.loads((RESULTS / "cpu_embedded_seeds.json").read_text())["seeds"]
    text = shown(compared(stored, stored))
    assert "OUTSIDE" not in text and text.count("within") == 6
    worse = [row | {"accuracy_after": row["accuracy_before"]} for row in stored]
    assert "OUTSIDE" in next(line for line in shown(compared(worse, stored)).splitlines() if " after " in line)
