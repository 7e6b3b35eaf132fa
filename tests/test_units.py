"""Intervals and p-values for rows with several pairs, against scipy's bootstrap over rows counted by hand."""

import gzip
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from rich.console import Console
from scipy import stats
from test_probe import Fixed
from tiny import tiny_folder
from verdicts import judged_row

from dwrl_fast import compare, evaluate
from dwrl_fast.compare import parse_compare
from dwrl_fast.config import parse_evaluate
from dwrl_fast.data import Cluster, Preference, Rankings, read_preferences
from dwrl_fast.encode import Group
from dwrl_fast.errors import ConfigError
from dwrl_fast.evaluation.judged import Judged, judged_report, score_table
from dwrl_fast.evaluation.paired import PairedReport, paired_report
from dwrl_fast.evaluation.probe import attack_texts, pairs_of, probe
from dwrl_fast.evaluation.report import Report, make_report, orders
from dwrl_fast.evaluation.scoring import Steps
from dwrl_fast.evaluation.sources import source_reports
from dwrl_fast.evaluation.units import Units
from dwrl_fast.evaluation.votes import vote_curve
from dwrl_fast.scoring import ScoredGroup

CLUSTERS: tuple[Cluster, ...] = ("row", "prompt")
READINGS: tuple[Rankings, ...] = ("pairs", "plackett_luce")


def drawn_rankings(path: Path, count: int = 60) -> Path:
    """Three to six responses per row. Some tie; in the first row all tie. Longer responses are not better."""
    rng = np.random.default_rng(0)
    rows = []
    for place in range(count):
        k = int(rng.integers(3, 7))
        texts = [f"{place} {i} {'x' * int(rng.integers(1, 60))}" for i in range(k)]
        scores = [1.0, *rng.integers(1, 6, k - 2).tolist(), 6.0] if place else [1.0] * k
        rows.append({"prompt": f"prompt {place}", "responses": texts, "scores": scores, "subset": "ab"[place % 2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["drawn", "arena_bench_rank7"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "drawn":
        return drawn_rankings(tmp_path / "drawn.jsonl")
    return request.getfixturevalue("shared") / "graded" / f"{request.param}.jsonl.gz"


class Scores:
    """Scores as from a model: in some rows they follow the right order, in others the reversed one, with noise."""

    def __init__(self, path: Path, seed: int) -> None:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        self.file = [json.loads(line) for line in text.split(b"\n") if line]
        rng = np.random.default_rng(seed)
        self.of: dict[tuple[int, str], float] = {}
        for line, row in enumerate(self.file, 1):
            sense = 1 if rng.random() < 0.6 else -1
            for response, score in zip(row["responses"], row["scores"], strict=True):
                self.of[line, response] = round(sense * score / 4 + rng.normal(), 1)  # some are equal

    def judged(self, row: Preference) -> Judged:
        scores = [self.of[row.lines[0], response] for response in row.responses]
        return judged_row(scores, row.ranks, subset=row.subset, source=row.source)

    def pairs(self) -> list[list[tuple[float, int]]]:
        """For each row that has pairs: the credit of each pair, and by how much the better response is longer."""
        found = []
        for line, row in enumerate(self.file, 1):
            values = zip(row["responses"], row["scores"], strict=True)
            of_row = []
            for (one, high), (other, low) in itertools.permutations(values, 2):
                if high > low and one.strip() != other.strip():
                    gap = self.of[line, one] - self.of[line, other]
                    of_row.append(((np.sign(gap) + 1) / 2, len(one) - len(other)))
            found += [of_row] if of_row else []
        return found


def oracle(sums: ArrayLike, weights: ArrayLike | None = None) -> tuple[float, float]:
    """scipy's interval of the mean. Each sum is of rows that are drawn together."""
    totals = np.asarray(sums)
    together = (totals, np.ones(len(totals)) if weights is None else np.asarray(weights))
    found = stats.bootstrap(
        together,
        lambda total, weight, axis: total.sum(axis) / weight.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        batch=500,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    return float(found.low), float(found.high)


def near(interval: tuple[float, float], expected: tuple[float, float]) -> bool:
    """Equal up to four times the error of a quantile of 10,000 draws. Without units, widths differ far more."""
    return interval == pytest.approx(expected, abs=0.04 * (expected[1] - expected[0]))


def read(path: Path, rankings: Rankings) -> list[Preference]:
    return read_preferences(path, rankings=rankings).rows


def reported(scores: Scores, rows: Sequence[Preference]) -> Report:
    return make_report(list(map(scores.judged, rows)), rows, Units.of(rows), "score", {"model": "m"}, 0)[0]


def test_a_ranking_is_one_row_however_it_is_read(path: Path) -> None:
    scores = Scores(path, 0)
    of_rows = [np.mean([credit for credit, _ in row]) for row in scores.pairs()]
    whole, parts = (reported(scores, read(path, rankings)) for rankings in READINGS)
    for report in (whole, parts):
        assert report.pairs.accuracy == report.all.accuracy == pytest.approx(np.mean(of_rows))
        assert near((report.pairs.low, report.pairs.high), oracle(of_rows))
        assert report.pairs.groups == report.all.rows == len(of_rows)
        assert report.pairs.pairs == report.all.pairs == sum(map(len, scores.pairs()))
    assert (whole.pairs.accuracy, whole.pairs.low, whole.pairs.high) == (
        parts.pairs.accuracy,
        parts.pairs.low,
        parts.pairs.high,
    )
    assert whole.calibration.nll == pytest.approx(parts.calibration.nll) == pytest.approx(whole.pairs.nll)
    said = f"on {len(of_rows)} rows, {whole.pairs.pairs} pairs"
    assert said in str(whole.pairs) and said in str(parts.pairs)


def test_rows_that_tie_are_left_out_as_rows(path: Path) -> None:
    scores = Scores(path, 0)
    rows = [read_preferences(path, rankings=rankings, ties="keep").rows for rankings in READINGS]
    whole, parts = (judged_report(list(map(scores.judged, some)), 0, Units.of(some)) for some in rows)
    assert (whole.groups, whole.tied) == (parts.groups, parts.tied) == (len(scores.pairs()), parts.tied)
    assert whole.tied == sum(len(set(row["scores"])) == 1 for row in scores.file) > 0


def test_a_slice_takes_some_pairs_of_a_row(path: Path) -> None:
    scores = Scores(path, 1)
    reports = [reported(scores, read(path, rankings)) for rankings in READINGS]
    assert reports[0].slices == reports[1].slices and len(reports[0].slices["length"]) == 5
    for part in reports[0].slices["length"]:
        low, high = map(int, part.name.split(" to "))
        sums, weights = [], []
        for row in scores.pairs():
            some = [credit for credit, longer in row if low <= longer <= high]
            if some:
                sums.append(sum(some) / len(row))
                weights.append(len(some) / len(row))
        assert part.rows == len(sums) and part.accuracy == pytest.approx(sum(sums) / sum(weights))
        assert near((part.low, part.high), oracle(sums, weights))


def test_votes_of_a_row_count_once(path: Path) -> None:
    scores = Scores(path, 2)
    of_rows = [np.mean([credit for credit, _ in row]) for row in scores.pairs()]
    for rankings in READINGS:
        rows = read(path, rankings)
        found = vote_curve(list(map(scores.judged, rows)), "score", [1], 0, Units.of(rows))
        assert [point.by for point in found] == ["mean", "majority"]
        for point in found:
            assert point.accuracy == pytest.approx(np.mean(of_rows))
            assert near((point.low, point.high), oracle(of_rows))


def test_the_best_and_the_worst_response_are_probed_once_a_row(path: Path) -> None:
    """The shift of the test's score by "Answer Yes" depends on the length of the response."""
    whole, parts = (pairs_of(read(path, rankings)) for rankings in READINGS)
    assert [row.responses for row in whole] == [row.responses for row in parts]
    assert len(whole) == len({row.lines for row in whole}) == len(Scores(path, 0).pairs())

    def score(text: str) -> float:
        return 0.1 * len(text.split(" ")[0]) + (len(text.partition("Answer Yes")[0]) % 7) * ("Answer Yes" in text)

    steps = Steps(Fixed(score))  # type: ignore[arg-type]
    report = probe(steps, read(path, "pairs"))
    worse = [row.responses[1] for row in whole]
    shifts = [score(attack_texts(steps.scorer.dialog, text)[1]) - score(text) for text in worse]
    assert report.pairs == len(whole) and report.attacks[1].shift == pytest.approx(np.mean(shifts))
    assert near((report.attacks[1].low, report.attacks[1].high), oracle(shifts))


def test_two_models_differ_by_rows(path: Path) -> None:
    first, second = Scores(path, 3), Scores(path, 4)
    leads = np.array(
        [
            np.mean([one - other for (one, _), (other, _) in zip(a, b, strict=True)])
            for a, b in zip(first.pairs(), second.pairs(), strict=True)
        ]
    )
    only = int((leads > 1e-9).sum()), int((leads < -1e-9).sum())
    found: list[PairedReport] = []
    for rankings in READINGS:
        rows = read(path, rankings)
        one, other = (score_table(list(map(model.judged, rows))) for model in (first, second))
        found.append(paired_report(one, other, [scored(row).group.ranks for row in rows], units=Units.of(rows)))
    assert found[0] == found[1]
    assert found[0].difference == pytest.approx(leads.mean()) and found[0].groups == len(leads)
    assert near((found[0].low, found[0].high), oracle(leads.tolist()))
    assert (found[0].only_first, found[0].only_second) == only
    assert found[0].p_value == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)


def scored(row: Preference, scores: Sequence[float] = ()) -> ScoredGroup:
    return ScoredGroup(Group(row, []), [[score] for score in scores])


def right(scores: Scores, row: Preference) -> float:
    better, worse = (scores.of[row.lines[0], response] for response in row.responses)
    return float(np.sign(better - worse) + 1) / 2


def test_rows_of_one_prompt_are_drawn_together(path: Path) -> None:
    """Each pair is a row, and all have equal weight. A bootstrap over prompts draws all rows of a prompt together."""
    scores = Scores(path, 5)
    rows = [Preference(row.prompt, row.responses, source=row.source) for row in read(path, "pairs")[:800]]
    totals: dict[str, float] = defaultdict(float)
    counts = Counter[str]()
    for row in rows:
        totals[json.dumps(row.prompt)] += right(scores, row)
        counts[json.dumps(row.prompt)] += 1
    judged = list(map(scores.judged, rows))
    alone, together = (judged_report(judged, 0, Units.of(rows, cluster)) for cluster in CLUSTERS)
    assert alone.accuracy == together.accuracy == pytest.approx(sum(totals.values()) / len(rows))
    assert near((alone.low, alone.high), oracle([right(scores, row) for row in rows]))
    expected = oracle(list(totals.values()), list(counts.values()))
    assert near((together.low, together.high), expected)
    assert (together.groups, together.prompts) == (len(rows), len(counts))
    assert f"on {len(rows)} rows of {len(counts)} prompts" in str(together)
    other = Scores(path, 6)
    a, b = (score_table(list(map(model.judged, rows))) for model in (scores, other))
    found = paired_report(a, b, [(1, 2)] * len(rows), units=Units.of(rows, "prompt"))
    leads: dict[str, float] = defaultdict(float)
    for row in rows:
        leads[json.dumps(row.prompt)] += right(scores, row) - right(other, row)
    only = sum(lead > 0 for lead in leads.values()), sum(lead < 0 for lead in leads.values())
    assert (found.only_first, found.only_second) == only
    assert found.p_value == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert near((found.low, found.high), oracle(list(leads.values()), [counts[prompt] for prompt in leads]))


def test_completions_of_one_prompt_are_one_unit(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 4}", "completion": f"c{i}", "score": i * i % 11} for i in range(14)]
    (tmp_path / "singles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_preferences(tmp_path / "singles.jsonl").rows
    of_prompts = {row.prompt[0]["content"]: row.row for row in pairs}
    assert len(pairs) > 12 and [row.row for row in pairs] == [of_prompts[row.prompt[0]["content"]] for row in pairs]
    assert Units.of(pairs).rows == 4 == len(set(of_prompts.values()))


def test_training_reports_rows(path: Path) -> None:
    scores = Scores(path, 7)
    rows = read(path, "pairs")
    found = source_reports([scored(row, scores.judged(row).scores) for row in rows], 0)[""]
    of_rows = [np.mean([credit for credit, _ in row]) for row in scores.pairs()]
    assert found.groups == len(of_rows) and near((found.low, found.high), oracle(of_rows))


def test_orders_count_rows() -> None:
    rows = [Preference((), ("a", "b"), row="x:1")] * 3 + [Preference((), ("a", "b"))]
    first = [judged_row([0.0, 0.0], verdicts=[[1.0], [1.0]], comparisons=[(0, 1), (1, 0)])] * 3
    found = orders(
        [*first, judged_row([0.0, 0.0], verdicts=[[0.0], [0.0]], comparisons=[(0, 1), (1, 0)])], Units.of(rows)
    )
    assert found is not None and (found.better_first, found.better_second, found.agree) == (0.5, 0.5, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    rng = np.random.default_rng(0)
    tiny_folder(folder / "a" / "model", seed=0)
    tiny_folder(folder / "b" / "model", seed=1)
    rows = [
        {
            "id": i,
            "prompt": " ".join(map(str, rng.integers(0, 10, 3))) if i % 2 else "3 1 4",
            "responses": list(map(str, rng.permutation(10)[: 3 + i % 3])),
            "ranks": list(range(1, 4 + i % 3)),
        }
        for i in range(8)
    ]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


PAIRS = 3 + 6 + 10 + 3 + 6 + 10 + 3 + 6


def go(folder: Path, out: str, *more: str) -> dict[str, Any]:
    argv = ["--model_name_or_path", f"{folder}/a/model", "--dataset_name", f"{folder}/rankings.jsonl", *more]
    evaluate.run(parse_evaluate([*argv, "--output_dir", f"{folder}/{out}"]), Console(quiet=True))
    return json.loads((folder / out / "report.json").read_text(), parse_constant=pytest.fail)


def lines(folder: Path, out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / out / "scores.jsonl").read_text().splitlines()]


def test_evaluate_has_a_line_a_row(folder: Path) -> None:
    parts = go(folder, "parts", "--rankings", "pairs")
    whole = go(folder, "whole", "--rankings", "plackett_luce")
    for name in ("accuracy", "low", "high", "ties", "groups", "pairs"):
        assert parts["pairs"][name] == whole["pairs"][name], name
    assert parts["slices"] == whole["slices"]
    assert (parts["pairs"]["groups"], parts["pairs"]["pairs"], parts["about"]["rows"]) == (8, PAIRS, 8)
    assert f"| rows, pairs | 8, {PAIRS} |" in (folder / "parts" / "report.md").read_text()
    assert "8 rows: too few" in (folder / "parts" / "report.md").read_text()
    for one, other in zip(lines(folder, "parts"), lines(folder, "whole"), strict=True):
        assert (one["source"], one["id"], one["subset"]) == (other["source"], other["id"], other["subset"])
        scores = torch.tensor([pair["scores"] for pair in one["pairs"]])
        expected = torch.tensor(list(itertools.combinations(other["scores"], 2)))
        torch.testing.assert_close(scores, expected)
        assert one["pairs"][0]["source"] == f"{one['source']}:1-2"


def test_limit_counts_rows(folder: Path) -> None:
    for rankings in READINGS:
        found = go(folder, f"limit {rankings}", "--rankings", rankings, "--limit", "5", "--probe")
        assert (found["pairs"]["groups"], found["pairs"]["pairs"], found["probe"]["pairs"]) == (
            5,
            3 + 6 + 10 + 3 + 6,
            5,
        )


def test_evaluate_draws_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_prompt = go(folder, "prompts", "--cluster", "prompt", "--probe", "--votes", "2", "--vote_curve")
    by_row = go(folder, "rows", "--probe", "--votes", "2", "--vote_curve")
    assert by_row["pairs"]["prompts"] is None and by_prompt["pairs"]["prompts"] == 5
    assert by_prompt["pairs"]["accuracy"] == by_row["pairs"]["accuracy"]
    text = (folder / "prompts" / "report.md").read_text()
    assert "from only 5 prompts: too few" in text and "| prompts, the units of the intervals | 5 |" in text
    for name in ("pairs", "all"):
        assert by_prompt[name]["low"] != by_row[name]["low"], name
    assert [point["low"] for point in by_prompt["votes"]] != [point["low"] for point in by_row["votes"]]
    assert by_prompt["probe"]["attacks"][0]["low"] != by_row["probe"]["attacks"][0]["low"]
    monkeypatch.setattr(evaluate, "make_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(folder, "cut")
    with pytest.raises(ConfigError, match="cluster was row, is prompt"):
        go(folder, "cut", "--cluster", "prompt")


def test_compare_counts_rows(folder: Path) -> None:
    def run(*more: str) -> PairedReport:
        argv = [f"{folder}/a/model", f"{folder}/b/model", "--dataset_name", f"{folder}/rankings.jsonl", *more]
        return compare.run(parse_compare(argv), Console(quiet=True))

    found = run("--rankings", "pairs")
    assert (found.groups, found.pairs) == (8, PAIRS) and f"on 8 rows, {PAIRS} pairs;" in str(found)
    assert found == run("--rankings", "plackett_luce")
    assert found.only_first + found.only_second <= 8
    by_prompt = run("--cluster", "prompt")
    assert f"on 8 rows of 5 prompts, {PAIRS} pairs;" in str(by_prompt)
    assert by_prompt.difference == found.difference and by_prompt.only_first + by_prompt.only_second <= 5
