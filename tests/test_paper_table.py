"""bench.learning.paper_table: its statistics on made-up results, its runs, and one small run of each kind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from rich.console import Console
from test_embedded import SIZES, TINY

from bench.learning.paper_table import FACTORS, Results, carry_out, cells, final_runs, swept_runs
from bench.learning.paper_table_figures import Line, Swept, lines, markdown, overview, sweep
from bench.learning.paper_table_runs import VARIANTS, Cell, Run, backbone, configure, execute
from dwrl_fast import embedded

CELL = Cell("sums", 0.7, 0)


def record(variant: str, credits: list[float], seed: int = 0, **more: Any) -> dict[str, Any]:
    report = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "unparsable": 0, "first_share": None}
    accuracy = sum(credits) / len(credits)
    values = {
        "cell": {"task": "sums", "easy_fraction": 0.7, "seed": seed},
        "variant": variant,
        "factor": 1.0,
        "split": "test",
        "credits": credits,
        "before": report,
        "after": report | {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05},
        "train_accuracy": None,
        "seconds": 10.0,
        "sampled_tokens": 1000,
        "trained_tokens": 3000,
    }
    return values | more


def test_a_line_averages_over_seeds_and_pairs_by_seed() -> None:
    records = [
        record("bt", [1, 0, 0, 0], seed=1, seconds=30.0),
        record("bt", [1, 1, 0.5, 0], seed=0, train_accuracy=0.8),
        record("dwrl", [1, 1, 1, 1], seed=0),
        record("dwrl", [1, 1, 1, 0], seed=1),
    ]
    dwrl, bt = lines(records)
    assert (dwrl.variant, dwrl.difference, dwrl.difference_interval) == ("dwrl", None, None)
    assert bt.accuracy == pytest.approx(3.5 / 8) and bt.seeds == {0: 0.625, 1: 0.25}
    assert bt.difference == pytest.approx(-3.5 / 8)
    assert bt.seconds == 20 and bt.train_accuracy == 0.8 and bt.first_share is None
    assert (dwrl.learnt, bt.learnt) == (2, 0)  # accuracy - 0.05 is above 0.6 for 1.00 and 0.75, not for 0.625 and 0.25


def test_pairing_narrows_the_interval() -> None:
    """Two methods differ in two of a hundred pairs. The interval of their difference is much narrower than that of each
    accuracy.
    """
    common = [1.0] * 50 + [0.0] * 50
    better = [1.0] * 52 + [0.0] * 48
    _, bt = lines([record("dwrl", better), record("bt", common)])
    assert bt.difference == pytest.approx(-0.02) and bt.difference_interval is not None
    low, high = bt.difference_interval
    assert -0.06 <= low < -0.02 < high <= 0
    assert bt.interval[1] - bt.interval[0] > 0.15


def test_without_the_baseline_there_is_no_difference() -> None:
    (line,) = lines([record("bt", [1, 0])])
    assert line.difference is None
    (line,) = lines([record("bt", [1, 0]), record("dwrl", [1, 0], split="dev")])
    assert line.difference is None


def test_unparsable_is_a_share_of_verdicts() -> None:
    first = record("judge", [1, 0, 0, 0])
    first["after"] |= {"unparsable": 2, "first_share": 0.75}
    (line,) = lines([first])
    assert line.unparsable == 0.25 and line.first_share == 0.75


def test_the_sweep_takes_the_best_and_of_equals_the_stored() -> None:
    def dev(factor: float, credits: list[float], seed: int = 100) -> dict[str, Any]:
        return record("bt", credits, seed, factor=factor, split="dev")

    (best,) = sweep([dev(0.3, [1, 0]), dev(1.0, [1, 0], 1), dev(1.0, [1, 1], 2), dev(3.0, [0, 0])])
    assert best.accuracy == {0.3: 0.5, 1.0: 0.75, 3.0: 0.0} and best.best == 1.0
    (equal,) = sweep([dev(0.3, [1, 0]), dev(1.0, [1, 0]), dev(3.0, [1, 0])])
    assert equal.best == 1.0
    runs = final_runs([CELL], ["bt", "dwrl"], sweep([dev(3.0, [1, 1]), dev(1.0, [0, 0])]))
    assert [run.factor for run in runs] == [3.0, 1.0]


def test_the_table_as_text() -> None:
    found = lines([record("dwrl", [1, 1]), record("bt", [1, 0])])
    text = markdown(found, sweep([record("bt", [1, 0], split="dev"), record("bt", [0, 0], factor=3.0, split="dev")]))
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3 and all(len({line.count("|") for line in rows}) == 1 for rows in tables)
    assert "| bt | 0.500 | 0.500 |" in text and "-0.500" in text and "**0.500**" in text


def test_all_tasks_at_a_glance() -> None:
    other = {"cell": {"task": "attributes", "easy_fraction": 0.0, "seed": 0}}
    found = lines([record("dwrl", [1, 1]), record("dwrl", [1, 0], seed=1), record("bt", [1, 0.5]) | other])
    assert overview(found).splitlines() == [
        "| method | attributes | sums, easy 0.7 |",
        "|---|---|---|",
        "| dwrl |  | 0.750 (0.500 to 1.000) |",
        "| bt | 0.750 (0.750 to 0.750) |  |",
    ]


def test_the_documents_hold_what_was_measured() -> None:
    results = ROOT / "bench" / "results" / "cpu_paper_table_full"
    stored = json.loads(results.with_suffix(".json").read_text())
    found = [Line(**line | {"seeds": {int(k): v for k, v in line["seeds"].items()}}) for line in stored["lines"]]
    swept = [
        Swept(each["task"], each["variant"], {float(k): v for k, v in each["accuracy"].items()})
        for each in stored["sweep"]
    ]
    assert len(found) == len(VARIANTS) * len(cells([0], full=True))
    assert markdown(found, swept) == results.with_suffix(".md").read_text()
    assert overview(found) in (ROOT / "docs" / "results.md").read_text()


def test_what_is_run() -> None:
    assert len(cells([0, 1], full=False)) == 2 and len(cells([0, 1], full=True)) == 8
    swept = swept_runs(list(VARIANTS))
    assert {run.split for run in swept} == {"dev"} and "judge" not in {run.variant for run in swept}
    assert {run.cell.seed for run in swept}.isdisjoint({0, 1, 2})  # learning rates are not chosen on the reported seeds
    each = [run for run in swept if run.variant == "bt" and run.cell.name == CELL.name]
    assert sorted(run.factor for run in each) == sorted(FACTORS)
    assert len({(run.cell.folder, run.folder) for run in swept}) == len(swept)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table")
    embedded.prepare(root / CELL.folder / "embedded", 0, sizes=SIZES, plan=TINY)
    return root


def test_learning_rates_are_scaled_together(root: Path) -> None:
    made = backbone(CELL, root)
    one, three = (configure(Run(CELL, "dwrl", factor), made, root / "x") for factor in (1.0, 3.0))
    assert three.score_learning_rate == pytest.approx(3 * (one.score_learning_rate or 0))
    assert three.thought_learning_rate == pytest.approx(3 * (one.thought_learning_rate or 0))
    assert replace(three, **{n: getattr(one, n) for n in ("learning_rate", "score_learning_rate")}) != one
    dev = configure(Run(CELL, "bt", 1.0, "dev"), made, root / "x")
    assert dev.eval_dataset_name[0].dataset_name == str(made.dev) and dev.dataset_name == str(made.train)


@pytest.mark.parametrize("variant", ["judge", "bt, prefilled thoughts", "gram", "star-sft"])
def test_a_run_is_judged_pair_by_pair(variant: str, root: Path) -> None:
    more = () if variant == "judge" else ("--max_steps", "1", "--rollout_batch_size", "16", "--minibatch_size", "8")
    (root / CELL.folder / Run(CELL, variant).folder / "checkpoint-000001").mkdir(parents=True)  # from a killed run
    found = execute(Run(CELL, variant), root, *more)
    assert len(found["credits"]) == SIZES.test and set(found["credits"]) <= {0, 0.5, 1}
    assert sum(found["credits"]) / SIZES.test == pytest.approx(found["after"]["accuracy"])
    assert (found["sampled_tokens"] > 0) == (variant in ("bt, prefilled thoughts", "star-sft"))
    (line,) = lines([found])
    assert line.variant == variant


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    results.add(record("bt", [1, 0]))
    again = Results(tmp_path / "results.jsonl")
    assert again.of([Run(CELL, "bt"), Run(CELL, "gram")]) == [record("bt", [1, 0])]
    carry_out([Run(CELL, "bt")], again, tmp_path, 1, Console(quiet=True))  # a run would create a backbone
    assert list(tmp_path.iterdir()) == [tmp_path / "results.jsonl"]
