"""The simulation of large runs, on cases with a known answer."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_plan import CPU, LLAMA

from bench.scale import PARTS, Pool, step, stops
from dwrl_fast.plan import PlanConfig, Setup, planned
from dwrl_fast.plan.trace import Traced, trace


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Traced]:
    path = tmp_path_factory.mktemp("scale") / "config.json"
    path.write_text(json.dumps(LLAMA))
    config = PlanConfig(model_config=str(path), dataset_name="", gpus=1, prompt_tokens=64, thought_tokens=20)
    setup = planned(config, config.lengths, CPU)
    return setup, trace(setup, 1)


def pool(groups: int, longest: int = 50) -> Pool:
    """Equal groups; the first has one thought of `longest` tokens among eight of 50."""
    thoughts = np.full((groups, 8), 50)
    thoughts[0, 0] = longest
    ones = np.ones(groups, dtype=np.int64)
    return Pool(1000 * ones, 300_000 * ones, 400 * ones, 10**9 * ones, 300 * ones, 200 * ones, thoughts)


def test_equal_groups_leave_no_rank_waiting(traced: tuple[Setup, Traced]) -> None:
    found = step(*traced, pool(8), 8, 64, 0)
    assert found["thoughts"] == pytest.approx(0, abs=1e-9) and found["stragglers"] == pytest.approx(0, abs=1e-9)
    assert min(found[part] for part in ("sampling", "updates", "gathers", "sync")) > 0


def test_ranks_without_groups_wait(traced: tuple[Setup, Traced]) -> None:
    """A minibatch of 8 groups on 32 ranks: a quarter of them compute, and the others wait three times as long."""
    many = step(*traced, pool(8), 32, 64, 0)
    fitting = step(*traced, pool(8), 8, 64, 0)
    assert many["updates"] + many["stragglers"] == pytest.approx(fitting["updates"], rel=0.2)
    assert many["stragglers"] > 2 * many["updates"]


def test_a_long_thought_is_waited_for(traced: tuple[Setup, Traced]) -> None:
    even, uneven = (step(*traced, pool(64, longest), 8, 64, 0) for longest in (50, 5000))
    assert even["thoughts"] < 1e-9 and uneven["thoughts"] > 0.1 * uneven["sampling"]


def test_where_a_size_stops() -> None:
    rows = [{"ranks": ranks, "seconds": seconds} | dict.fromkeys(PARTS, 0.0) for ranks, seconds in
            ((8, 100.0), (16, 55.0), (32, 45.0))]  # fmt: skip
    rows[1]["updates"], rows[2]["updates"], rows[2]["gathers"] = 40.0, 21.0, 10.0
    assert stops(rows) == {"scales_to": 16, "limited_by": "gathers"}, "updates, which are more, are nearly halved"
    assert stops(rows[:2]) == {"scales_to": 16, "limited_by": "-"}


def test_the_recorded_figures_are_those_of_the_docs() -> None:
    root = Path(__file__).parent.parent
    recorded = json.loads((root / "bench" / "results" / "simulated_scale.json").read_text())
    text = (root / "docs" / "plan.md").read_text()
    for each in recorded["limits"]:
        assert f"| {each['data']} | {each['rollout']:,} | {each['scales_to']:,} | {each['limited_by']} |" in text
    timed = json.loads((root / "bench" / "results" / "cpu_plan.json").read_text())
    for name, case in timed["cases"].items():
        said, real = (sum(case[kind].values()) for kind in ("predicted", "measured"))
        assert f"| {name} | {said:.2f} | {real:.2f} | {said / real:.2f} |" in text
        assert abs(said / real - 1) < 0.25
