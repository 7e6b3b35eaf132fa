"""The comparison of two models: statistics against scipy and statsmodels, the command and its output file."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import tiny_folder, tiny_pairs

from dwrl_fast import compare
from dwrl_fast.compare import CompareConfig, parse_compare
from dwrl_fast.errors import ConfigError, DataError, ModelError
from dwrl_fast.evaluation.paired import disagreements, mcnemar, paired_report
from dwrl_fast.options import help_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny_folder(folder / "a" / "model", seed=0)
    tiny_folder(folder / "b" / "model", seed=1)
    tiny_pairs(folder / "pairs.jsonl", 24)
    return folder


def argv(folder: Path, *more: str) -> list[str]:
    return [f"{folder}/a/model", f"{folder}/b/model", "--dataset_name", f"{folder}/pairs.jsonl", *more]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 0), (5, 5), (10, 24), (31, 30), (700, 400)])
def test_mcnemar_is_that_of_statsmodels(first: int, second: int) -> None:
    statsmodels = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = statsmodels.mcnemar([[9, first], [second, 4]], exact=True).pvalue
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_of_many() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(4_900, 5_100) == pytest.approx(stats.binomtest(4_900, 10_000).pvalue, rel=1e-9)
    assert mcnemar(0, 5_000) == 0.0 or mcnemar(0, 5_000) < 1e-300


def test_the_difference_and_its_paired_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    first = torch.randn(300, 2, generator=g, dtype=torch.float64)
    second = first + 0.8 * torch.randn(300, 2, generator=g, dtype=torch.float64)
    first[:, 0] += 0.4
    ranks = [(1, 2)] * 300
    report = paired_report(first, second, ranks)
    right = [(s[:, 0] > s[:, 1]).double().numpy() for s in (first, second)]
    assert report.difference == pytest.approx(right[0].mean() - right[1].mean())
    assert report.only_first == (right[0] > right[1]).sum() and report.only_second == (right[0] < right[1]).sum()
    assert report.agreement == pytest.approx((right[0] == right[1]).mean())
    interval = stats.bootstrap(
        (right[0] - right[1],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert (report.low, report.high) == pytest.approx((interval.low, interval.high), abs=4e-3)
    apart = right[0].std() / 300**0.5 + right[1].std() / 300**0.5
    assert report.high - report.low < 2 * 1.96 * apart, "the interval of a paired difference, not of two samples"


def test_ties_and_rankings() -> None:
    inf = torch.inf
    ranks = [(1, 2), (1, 2), (1, 1), (1, 2, 3), (1, 2)]
    nan = torch.nan
    first = torch.tensor([[0, 0, nan], [2, 1, nan], [3, 1, nan], [3, 2, 1], [-inf, -inf, nan]]).double()
    second = torch.tensor([[1, 0, nan], [1, 2, nan], [1, 3, nan], [2, 3, 1], [-inf, -inf, nan]]).double()
    report = paired_report(first, second, ranks)
    assert report.groups == 4  # one row ties
    assert (report.only_first, report.only_second) == (2, 1)  # a tie is better than a wrong order, and worse than right
    assert report.difference == pytest.approx((-0.5 + 1 + 1 / 3 + 0) / 4)
    assert report.agreement == pytest.approx((0 + 0 + 2 / 3 + 1) / 4)
    assert sorted(disagreements(first, second, ranks)) == [0, 1, 3]
    assert disagreements(first, second, ranks)[0] == 1


def run(folder: Path, *more: str) -> str:
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    compare.run(parse_compare(argv(folder, *more)), console)
    return console.export_text()


def test_two_models_and_what_they_disagree_about(folder: Path, tmp_path: Path) -> None:
    said = run(folder, "--output_file", f"{tmp_path}/differ.jsonl")
    accuracy = [float(found) for found in re.findall(r"^[AB]  .*: accuracy (\S+)", said, re.M)]
    found = re.search(r"A - B: difference (\S+) .* better on (\d+) against (\d+), p = (\S+); agreement (\S+)", said)
    assert found is not None and float(found[1]) == pytest.approx(accuracy[0] - accuracy[1], abs=2e-3)
    lines = [json.loads(line) for line in (tmp_path / "differ.jsonl").read_text().splitlines()]
    assert f"{len(lines)} disagreements" in said and len(lines) == int(found[2]) + int(found[3]) > 2
    for line in lines:
        a, b = (line[name]["scores"] for name in "ab")
        assert (a[0] > a[1]) != (b[0] > b[1])
        assert len(line["responses"]) == len(line["a"]["thoughts"]) == 2 and len(line["a"]["thoughts"][0]) == 1
    assert sum(line["a"]["scores"][0] > line["a"]["scores"][1] for line in lines) == int(found[2])
    run(folder, "--output_file", f"{tmp_path}/differ.md")
    text = (tmp_path / "differ.md").read_text()
    assert text.count("\n## ") == len(lines) and text.count("A on response 1:") == len(lines)
    assert text.startswith(f"# {len(lines)} disagreements") and f"\n```text\n{lines[0]['responses'][1]}\n```\n" in text
    assert text.index(lines[0]["source"]) < text.index(lines[1]["source"])


def test_a_model_against_itself(folder: Path) -> None:
    itself = [f"{folder}/a/model", f"{folder}/a/model", "--dataset_name", f"{folder}/pairs.jsonl"]
    report = compare.run(parse_compare(itself), Console(quiet=True))
    assert (report.difference, report.low, report.high, report.p_value, report.agreement) == (0, 0, 0, 1, 1)


def test_models_of_two_aspects_are_compared_by_one(tmp_path: Path) -> None:
    """Otherwise each model would be compared with labels of its own."""
    rows = [{"prompt": "3", "response": str(i), "helpfulness": i, "honesty": i} for i in (7, 9)]
    rated = {name: {"Rating": 1} for name in ("helpfulness", "honesty")}
    answers = [{"response": str(i), "overall_score": i, "annotations": rated} for i in (7, 9)]
    tied = {"instruction": "3", "completions": [{"response": str(i), "overall_score": 1} for i in (7, 9)]}
    files: dict[str, list[dict[str, Any]]] = {
        "columns": rows,
        "own": [row | {"aspect": "honesty"} for row in rows],
        "plain": [row | {"score": i} for i, row in enumerate(rows)],
        "rated": [tied, {"instruction": "3", "completions": answers}],
    }
    for name, some in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))

    def check(data: str, a: str | None, b: str | None) -> None:
        compare.check_aspects(parse_compare(["a", "b", "--dataset_name", f"{tmp_path}/{data}"]), a, b)

    for data, a, b in (
        ("columns", "honesty", "honesty"),
        ("columns", "helpfulness", None),
        ("columns::honesty", "honesty", None),
        ("own", "honesty", None),
        ("plain", "honesty", None),
        ("rated", "safety", "harmlessness"),
        ("rated", "safety", None),
    ):
        check(data, a, b)
    for data, one, other, said in (
        ("columns", None, "honesty", "A .* with the scores of helpfulness, and B with the scores of honesty"),
        ("rated", "helpfulness", None, "A .* with the scores of helpfulness, and B with the overall scores"),
        ("rated", "safety", "honesty", "A .* with the overall scores, and B with the scores of honesty"),
    ):
        with pytest.raises(ConfigError, match=f"{said}. Name the aspect .*: --aspect helpfulness or honesty"):
            check(data, one, other)
    with pytest.raises(DataError, match="no scores of safety; name the scores to take: --aspect helpfulness or"):
        check("columns", "honesty", "safety")


def test_rows_that_only_one_model_can_read_are_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    read_rows = compare.read_rows

    def shorter(parts: object, config: object, dialog: object, *rest: object, **more: object) -> object:
        rows, longest = read_rows(parts, config, dialog, *rest, **more)  # type: ignore[arg-type]
        lengths.append(len(rows))
        return (rows[2:] if len(lengths) == 1 else rows[:-3]), longest

    monkeypatch.setattr(compare, "read_rows", shorter)
    with caplog.at_level("INFO", "dwrl_fast"):
        report = compare.run(parse_compare(argv(folder)), Console(quiet=True))
    assert report.groups == 24 - 5
    assert "3 pairs or rankings are left out because only A can read them" in caplog.text
    assert "2 pairs or rankings are left out because only B can read them" in caplog.text
    monkeypatch.setattr(compare, "read_rows", lambda *a, **k: ([], 0))
    with pytest.raises(DataError, match="no row can be read by both models"):
        compare.run(parse_compare(argv(folder)), Console(quiet=True))


def test_a_model_that_is_missing_is_said_before_the_other_is_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(compare, "read_rows")
    with pytest.raises(ModelError, match=r"nowhere has no preference_model\.json"):
        compare.main([f"{folder}/a/model", f"{folder}/nowhere", "--dataset_name", f"{folder}/pairs.jsonl"])


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "differ.md").write_text("mine")
    for name, said in [
        (f"{tmp_path}/differ.md", "exists already"),
        (f"{tmp_path}/nowhere/differ.md", "folder does not exist"),
        (f"{tmp_path}/differ.csv", r"must end with .jsonl or .md"),
    ]:
        with pytest.raises(ConfigError, match=said):
            parse_compare(argv(folder, "--output_file", name))
    assert (tmp_path / "differ.md").read_text() == "mine"


def test_the_command_line() -> None:
    config = parse_compare(["A", "B", "--dataset_name", "pairs.jsonl"])
    assert (config.model_a, config.model_b) == ("A", "B")
    assert config == parse_compare(["--model_b", "B", "--dataset_name", "pairs.jsonl", "--model_a", "A"])
    for models in (["A"], ["A", "B", "C"]):
        with pytest.raises(ConfigError, match=f"expected two models before the options, found {len(models)}"):
            parse_compare([*models, "--dataset_name", "pairs.jsonl"])
    with pytest.raises(ConfigError, match="--dataset_name is missing"):
        parse_compare(["A", "B"])
    page = help_page(CompareConfig, 100)
    assert page.startswith("Usage: python -m dwrl_fast.compare A B [--config") and "McNemar" in page
    for line in re.findall(r"python -m dwrl_fast\.compare (.*)", CompareConfig.examples):
        parse_compare(line.split())
