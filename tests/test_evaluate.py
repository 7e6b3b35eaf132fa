"""`python -m dwrl_fast.evaluate` from files to reports: its files, resumption, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from judging import RUBRIC
from rich.console import Console
from tiny import tiny_folder, tiny_pairs

from dwrl_fast import evaluate
from dwrl_fast.config import parse_evaluate
from dwrl_fast.errors import ConfigError, ModelError, UserError
from dwrl_fast.evaluation.pairs import PairReport
from dwrl_fast.evaluation.scoring import PartFile
from dwrl_fast.log import warn_once
from dwrl_fast.scoring import GenerativeJudging

WRITTEN = ["report.html", "report.json", "report.md", "scores.jsonl"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "tiny")
    tiny_pairs(tmp_path / "plain.jsonl", 14)
    rows = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    subsets = ["mt-bench-easy", "math-prm"]
    lines = [row | {"subset": subsets[i % 2], "id": i} for i, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "rubric.yaml").write_text(RUBRIC)
    return tmp_path


def go(folder: Path, *more: str, out: str | None = "out", data: str = "pairs.jsonl") -> PairReport:
    argv = ["--model_name_or_path", f"{folder}/tiny", "--dataset_name", f"{folder}/{data}", *more]
    argv += [] if out is None else ["--output_dir", f"{folder}/{out}"]
    return evaluate.run(parse_evaluate(argv), Console(quiet=True))


def report(folder: Path, out: str = "out") -> dict[str, Any]:
    return json.loads((folder / out / "report.json").read_text(), parse_constant=pytest.fail)


def test_what_is_written(folder: Path) -> None:
    pairs = go(folder, "--votes", "3")
    assert sorted(path.name for path in (folder / "out").iterdir()) == WRITTEN
    found = report(folder)
    assert found["pairs"]["accuracy"] == pairs.accuracy == found["all"]["accuracy"]
    assert found["calibration"]["nll"] == pytest.approx(pairs.nll, abs=1e-12)
    assert found["about"]["method"] == "dwrl" and found["about"]["thoughts"] == "3 sampled"
    rows = [json.loads(line) for line in (folder / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(14)] and rows[1]["subset"] == "math-prm"
    assert all(len(row["thoughts"]) == 2 and len(row["thoughts"][0]) == 3 for row in rows)
    right = [row["scores"][0] > row["scores"][1] for row in rows]
    assert pairs.accuracy == sum(right) / 14
    by_subset = {part["name"]: part["accuracy"] for part in found["slices"]["subset"]}
    assert by_subset == {"mt-bench-easy": sum(right[::2]) / 7, "math-prm": sum(right[1::2]) / 7}
    markdown = (folder / "out" / "report.md").read_text()
    assert f"| accuracy | {pairs.accuracy:.3f}, 95 % interval" in markdown and "## By subset" in markdown
    with pytest.raises(ConfigError, match=r"out holds a finished evaluation"):
        go(folder, "--votes", "3")


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_name_or_path", f"{folder}/tiny", "--dataset_name", f"{folder}/pairs.jsonl"]
    found = evaluate.run(parse_evaluate(argv), Console(width=150))
    said = capsys.readouterr().out
    assert "comes from only 14 rows: too few" in said
    assert f"accuracy {found.accuracy:.3f}" in said and "thoughts: one, greedy" in said
    assert "By subset" in said and "longer response wins" in said and "tokens computed, naively" in said


def test_tokens_are_those_of_the_tree(folder: Path) -> None:
    """The context of n thoughts is computed once, and the rate turn is appended, in every layout."""
    go(folder, "--votes", "6")
    tree = report(folder)["tokens"]
    go(folder, "--votes", "6", "--packing", "packed", out="packed")
    packed = report(folder, "packed")["tokens"]
    assert tree == packed and tree["naive"] > 3 * tree["computed"]
    assert report(folder)["pairs"]["accuracy"] == report(folder, "packed")["pairs"]["accuracy"]


class Killed(Exception):
    pass


def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> list[int]:
    """Let the scorer run `steps` steps; the list holds the number of rows of each."""
    asked: list[int] = []
    whole = GenerativeJudging.score_groups

    def score_groups(self: GenerativeJudging, rows: Any, **options: Any) -> Any:
        if len(asked) == steps:
            raise Killed
        asked.append(len(rows))
        return whole(self, rows, **options)

    monkeypatch.setattr(GenerativeJudging, "score_groups", score_groups)
    return asked


STEPS = ["--votes", "3", "--generation_batch_size", "12"]  # four rows a step: 4, 4, 4, 2


def test_an_interrupted_evaluation_gives_the_same_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(folder, *STEPS, out="whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            go(folder, *STEPS)
    part = folder / "out" / evaluate.PART
    assert [path.name for path in (folder / "out").iterdir()] == [evaluate.PART]
    with part.open("a") as file:
        file.write('{"rows": [{"source": "pa')  # an incomplete line after a kill
    with monkeypatch.context() as patch:
        asked = killed_after(patch, 1)
        with pytest.raises(Killed):
            go(folder, *STEPS)
        assert asked == [4]
    with monkeypatch.context() as patch:
        asked = killed_after(patch, 9)
        go(folder, *STEPS)
        assert asked == [2], "rows that are finished are not scored again"
    for name in WRITTEN:
        assert (folder / "out" / name).read_text() == (folder / "whole" / name).read_text(), name


def test_an_interrupted_probe_gives_the_same_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of rows, then one of each of 14 pairs: eight responses a step, seven of them a pair's."""
    go(folder, *STEPS, "--probe", out="whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 4 + 5)
        with pytest.raises(Killed):
            go(folder, *STEPS, "--probe")
    part = folder / "out" / evaluate.PART
    assert [json.loads(line)["stage"] for line in part.read_text().splitlines()[1:]] == ["rows"] * 4 + ["probe"] * 5
    with part.open("a") as file:
        file.write('{"stage": "probe", "results": [[')
    with monkeypatch.context() as patch:
        asked = killed_after(patch, 3)
        with pytest.raises(Killed):
            go(folder, *STEPS, "--probe")
        assert asked == [1] * 3, "a row of seven responses each"
    with monkeypatch.context() as patch:
        asked = killed_after(patch, 99)
        go(folder, *STEPS, "--probe")
        assert asked == [1] * 6, "neither rows nor pairs that are finished are scored again"
    for name in WRITTEN:
        assert (folder / "out" / name).read_text() == (folder / "whole" / name).read_text(), name
    tokens = report(folder)["probe"]["tokens"]
    assert report(folder)["tokens"]["computed"] < tokens["computed"] < tokens["naive"]
    said = f"| the probe's tokens computed, naively | {tokens['computed']:,}, {tokens['naive']:,} ("
    assert said in (folder / "out" / "report.md").read_text()


def test_rows_that_were_scored_without_a_probe_can_be_probed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(Killed):
            go(folder, *STEPS)
    go(folder, *STEPS, "--probe")
    assert report(folder)["probe"]["pairs"] == 14


def test_two_evaluations_in_one_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    path = folder / "out" / evaluate.PART
    with (
        PartFile(path, {"model": "another"}),
        pytest.raises(ConfigError, match=r"another process is writing its evaluation into .*out"),
    ):
        go(folder)
    with pytest.raises(ConfigError, match="unfinished evaluation of another kind: model was another"):
        go(folder)


@pytest.mark.parametrize("line", ["{}", "[1]", "nothing", '{"stage": "rows", "results": 3, "tokens": {}}'])
def test_a_part_file_that_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            go(folder, *STEPS)
    part = folder / "out" / evaluate.PART
    text = part.read_text()
    part.write_text(f"{text}{line}\n")
    with pytest.raises(ConfigError, match=r"scores\.part\.jsonl, line 3, is not a step"):
        go(folder, *STEPS)
    assert part.read_text() == f"{text}{line}\n", "it is left as it is"


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    (folder / "file").write_text("mine")
    for out in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"--output_dir .*file.* cannot be made"):
            go(folder, out=out)


def test_another_evaluation_in_the_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            go(folder, *STEPS)
    with pytest.raises(ConfigError, match=r"out holds an unfinished evaluation.*temperature was None, is 0\.5"):
        go(folder, *STEPS, "--temperature", "0.5")
    with pytest.raises(ConfigError, match=r"data was .*pairs\.jsonl.*, is .*plain\.jsonl"):
        go(folder, *STEPS, data="plain.jsonl")
    rows = (folder / "pairs.jsonl").read_text()
    (folder / "pairs.jsonl").write_text("\n".join(rows.splitlines()[1:]) + "\n")
    with pytest.raises(ConfigError, match="its rows was"):
        go(folder, *STEPS)
    (folder / "pairs.jsonl").write_text(rows)
    tiny_folder(folder / "tiny", seed=1)
    with pytest.raises(ConfigError, match="the model's files was"):
        go(folder, *STEPS)


def test_the_vote_curve_ends_in_the_headline(folder: Path) -> None:
    pairs = go(folder, "--vote_curve")
    found = report(folder)["votes"]
    assert [point["votes"] for point in found] == [1, 4, 16, 32] * 2
    assert next(point for point in found if point["votes"] == 32)["accuracy"] == pairs.accuracy
    assert report(folder)["about"]["thoughts"] == "32 sampled"
    go(folder, "--vote_curve", "--votes", "5", out="five")
    assert [point["votes"] for point in report(folder, "five")["votes"]] == [1, 4, 5] * 2
    with pytest.raises(ConfigError, match="no curve of one thought"):
        go(folder, "--vote_curve", "--votes", "1")


def test_a_temperature_is_kept_in_the_card(folder: Path) -> None:
    path = folder / "tiny" / "preference_model.json"
    before = json.loads(path.read_text())
    for seed in range(9):  # a random model may order at most half of the pairs correctly
        tiny_folder(folder / "tiny", seed)
        go(folder, "--calibrate", out=f"out{seed}")
        found = report(folder, f"out{seed}")
        if found["temperature"] is not None:
            break
        assert "calibration" not in json.loads(path.read_text())
    card = json.loads(path.read_text())
    assert card["calibration"]["temperature"] == found["temperature"] > 0 and card["calibration"]["pairs"] == 14
    assert {k: v for k, v in card.items() if k != "calibration"} == before
    assert found["calibrated"]["nll"] < found["calibration"]["nll"]
    again = go(folder, out="again")
    assert again.nll == pytest.approx(found["calibration"]["nll"], abs=1e-12), "scores stay as they are"


def test_a_closed_pipe_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "show", closed)
    with pytest.raises(BrokenPipeError):
        go(folder, "--calibrate")
    found = report(folder)
    card = json.loads((folder / "tiny" / "preference_model.json").read_text())
    assert card.get("calibration", {}).get("temperature") == found["temperature"]


def test_the_folder_of_a_run_is_told_from_its_model(folder: Path) -> None:
    (folder / "tiny").rename(folder / "model")
    folder.joinpath("tiny").mkdir()
    (folder / "model").rename(folder / "tiny" / "model")
    with pytest.raises(ModelError, match=r"tiny is a run's folder: give .*tiny/model"):
        go(folder)


def test_any_model_as_a_judge(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "tiny" / "preference_model.json").unlink()
    with pytest.raises(UserError, match=r"no preference_model\.json"):
        go(folder)
    judge = ["--method", "judge", "--template", f"{folder}/rubric.yaml", "--max_completion_length", "6"]
    pairs = go(folder, *judge, "--vote_curve", "--votes", "4")
    found = report(folder)
    assert found["kind"] == "comparison" and found["about"]["method"] == "judge"
    assert 0 < pairs.unparsable <= 14 * 2 * 4 and found["calibration"]["nll"] is None
    assert (f"{pairs.unparsable} of 112 verdicts could not be read" in caplog.text) == (pairs.unparsable > 56)
    assert [point["by"] for point in found["votes"]] == ["majority"] * 2
    assert found["votes"][-1]["accuracy"] == pairs.accuracy
    row = json.loads((folder / "out" / "scores.jsonl").read_text().splitlines()[0])
    assert row["comparisons"] == [[0, 1], [1, 0]] and len(row["verdicts"][0]) == 4
    assert "better one shown first" in (folder / "out" / "report.md").read_text()
    with pytest.raises(ConfigError, match="template without --method judge"):
        go(folder, *judge[2:])
    with pytest.raises(ConfigError, match="no scale to calibrate"):
        go(folder, *judge, "--calibrate")


def test_benchmarks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(folder, "--benchmark", "rewardbench")
    found = report(folder)["benchmark"]
    accuracy = {part["name"]: part["accuracy"] for part in report(folder)["slices"]["subset"]}
    assert found["details"] == accuracy and found["headline"] is None
    assert found["parts"] == {"Chat": accuracy["mt-bench-easy"], "Reasoning": accuracy["math-prm"]}
    rows = [
        {"id": "1", "prompt": "3 1 4", "chosen": ["7"], "rejected": ["8", "9", "5"], "subset": "Math"},
        {"id": "ref:0", "prompt": "2", "chosen": ["2"], "rejected": ["3"], "subset": "Ties"},
        {"id": "tied:0", "prompt": "2", "chosen": ["2", "1"], "rejected": ["3", "4"], "subset": "Ties"},
    ]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    go(folder, "--benchmark", "rewardbench2", data="two.jsonl", out="two")
    found = report(folder, "two")["benchmark"]
    scores = [json.loads(line)["scores"] for line in (folder / "two" / "scores.jsonl").read_text().splitlines()]
    assert found["parts"]["Math"] == float(scores[0][0] == max(scores[0]))
    assert found["details"]["ref accuracy"] == float(scores[1][0] > scores[1][1])
    assert found["details"]["tied accuracy"] == float(min(scores[2][:2]) > max(scores[2][2:]))
    for change, said in (({"subset": "Maths"}, "'Maths' is not one of RewardBench 2's"), ({"id": "1"}, "ref:NUMBER")):
        (folder / "two.jsonl").write_text(json.dumps(rows[2] | change) + "\n")
        with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
            killed_after(patch, 0)  # before anything is scored
            go(folder, "--benchmark", "rewardbench2", data="two.jsonl", out="three")


def test_a_model_without_thoughts_has_no_votes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "tiny" / "preference_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "sft"}))
    with pytest.raises(ConfigError, match="judges without thoughts"):
        go(folder, "--vote_curve")
    warn_once.cache_clear()
    go(folder, "--votes", "8", "--calibrate")
    assert "votes has no effect here: this model judges without thoughts" in caplog.text
    found = report(folder)
    assert found["about"]["thoughts"] == "none" and found["pairs"]["token_accuracy"] is not None
    assert json.loads(path.read_text()).get("calibration", {"votes": 1})["votes"] == 1


def test_thoughts_do_not_depend_on_the_step(folder: Path) -> None:
    """A different step size and different other rows give the same thoughts. A different seed gives different ones."""
    rows = (folder / "plain.jsonl").read_text().splitlines()
    (folder / "moved.jsonl").write_text("\n".join([*rows[3:6], rows[0], *rows[1:3]]) + "\n")

    def thoughts(*options: str, data: str = "plain.jsonl") -> list[Any]:
        shutil.rmtree(folder / "out", ignore_errors=True)
        go(folder, *options, data=data)
        lines = [json.loads(line) for line in (folder / "out" / "scores.jsonl").read_text().splitlines()]
        return [line["thoughts"] for line in lines]

    found = thoughts(*STEPS)
    assert thoughts(*STEPS, "--generation_batch_size", "64") == found
    assert thoughts(*STEPS, data="moved.jsonl")[:4] == [*found[3:6], found[0]]
    assert thoughts(*STEPS, "--seed", "1") != found
