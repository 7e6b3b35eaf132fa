"""Mixtures and streams with the real trainer: shares, aspects, accuracies by source, bit-exact resumption."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_resume import rewrite
from tiny import tiny_config, tiny_folder, tiny_pairs

from dwrl_fast import evaluate, train
from dwrl_fast.config import TrainConfig, parse_evaluate
from dwrl_fast.data import Preference
from dwrl_fast.data.mixture import Part
from dwrl_fast.encode import Group
from dwrl_fast.errors import CheckpointError, DataError
from dwrl_fast.evaluation.pairs import pair_report
from dwrl_fast.evaluation.sources import source_accuracy, source_of, source_reports
from dwrl_fast.feed import open_feed
from dwrl_fast.log import warn_once
from dwrl_fast.progress import Display
from dwrl_fast.scoring import ScoredGroup, marginal_scores
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.training.runlog import read_metrics

TIMED = ("seconds", "tokens_per_second", "share_")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "tiny")
    tiny_pairs(tmp_path / "a.jsonl", 9, seed=1)
    tiny_pairs(tmp_path / "b.jsonl", 5, seed=2)
    return tmp_path


def mixed(folder: Path, **changes: Any) -> TrainConfig:
    parts = (Part(f"{folder}/a.jsonl", 0.7, "1"), Part(f"{folder}/b.jsonl", 0.3))
    options = {"dataset_name": None, "dataset_mixture": parts, "max_steps": 6, "save_steps": 1, "eval_votes": 0}
    return tiny_config(folder, **options | {"output_dir": str(folder / "whole"), **changes})


def long_row(folder: Path) -> None:
    """Make a row in the middle of a.jsonl longer than the limit."""
    rows = (folder / "a.jsonl").read_text().splitlines()
    row = json.loads(rows[4])
    row["prompt"][0]["content"] = " ".join(["1"] * 60)
    (folder / "a.jsonl").write_text("".join(line + "\n" for line in [*rows[:4], json.dumps(row), *rows[5:]]))


def silent(config: TrainConfig) -> dict[str, Any]:
    return train.run(config, Console(quiet=True))


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith(TIMED)}


@pytest.mark.parametrize(
    "changes",
    [
        {"streaming": True, "method": "bt"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"streaming": True, "shuffle_buffer_size": 3}, marks=pytest.mark.slow),
    ],
)
def test_a_mixture_resumes_to_the_bit(folder: Path, changes: dict[str, Any]) -> None:
    """24 draws from files of 9 and 5 rows read each file more than once. A stream's buffer drains and refills."""
    long_row(folder)
    config = mixed(folder, max_length=40, **changes)
    whole = silent(config)
    expected, log = load_file(folder / "whole/model/model.safetensors"), read_metrics(folder / "whole/metrics.jsonl")
    assert {"train_accuracy/a", "train_accuracy/b"} <= log[0].keys()
    assert whole["sources"]["a"]["drawn"] == 17 and whole["sources"]["b"]["drawn"] == 7
    assert whole["sources"]["a"]["rows"] == 8 and whole["rows"] == 8 + 5
    for step in (1, 3, 4):
        path, run = folder / "whole" / f"checkpoint-{step:06d}", folder / f"resumed-{step}"
        run.mkdir()
        result = silent(dataclasses.replace(config, output_dir=str(run), resume_from_checkpoint=str(path)))
        again = read_metrics(run / "metrics.jsonl")
        assert list(map(untimed, again)) == list(map(untimed, log[step:]))
        model = load_file(run / "model/model.safetensors")
        assert all(torch.equal(expected[name], p) for name, p in model.items())
        assert result["sources"] == whole["sources"]


def test_a_changed_stream_is_refused(folder: Path) -> None:
    config = mixed(folder, streaming=True, max_steps=2)
    silent(config)
    again = dataclasses.replace(
        config, output_dir=f"{folder}/again", resume_from_checkpoint=f"{folder}/whole/checkpoint-000001"
    )
    for changes in (
        {"max_length": 30},
        {"dataset_mixture": (config.dataset_mixture[0], Part(f"{folder}/b.jsonl", 0.4))},
    ):
        (folder / "again").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=r"the data set: its rows, .* is different"):
            silent(dataclasses.replace(again, **changes))
    with pytest.raises(CheckpointError, match="streaming was True, is False"):
        silent(dataclasses.replace(again, streaming=False))
    tiny_pairs(folder / "b.jsonl", 5, seed=3)
    with pytest.raises(CheckpointError, match=r"the data set: its rows, .* is different"):
        silent(again)


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        ({"dataset_mixture": ("a", "b", "c")}, {}, "the number of files or data sets was 3, is 2"),
        ({"dataset_mixture": (), "dataset_name": "a"}, {}, "the number of files or data sets was 1, is 2"),
        ({}, {"dataset_mixture": (), "dataset_name": "b"}, "the number of files or data sets was 2, is 1"),
        ({}, {"streaming": True}, r"read its rows in memory, and this run reads .*a\.jsonl as a stream"),
        ({"streaming": True}, {}, r"read its rows as a stream, and this run reads .*a\.jsonl in memory"),
        ({"streaming": True}, {"streaming": True, "dataset_mixture": ("b", "a")}, "only for the same files"),
        ({"streaming": True}, {"streaming": True, "max_length": 60}, "same files, read with the same options"),
        ({"streaming": True, "aspect": "2"}, {"streaming": True}, "same files, read with the same options"),
        ({"rollout_batch_size": 8, "max_steps": 3}, {}, "16 of the 24 rows of this run were used already, too many"),
    ],
)
def test_other_data_starts_from_its_beginning(
    folder: Path, caplog: pytest.LogCaptureFixture, was: dict[str, Any], now: dict[str, Any], why: str
) -> None:
    """From a checkpoint within a rollout batch, whose rows are those of the earlier files."""

    def config(changes: dict[str, Any], **more: Any) -> TrainConfig:
        named: dict[str, Any] = {}
        if "dataset_name" in changes:
            named["dataset_name"] = f"{folder}/{changes['dataset_name']}.jsonl"
        if "dataset_mixture" in changes:
            named["dataset_mixture"] = tuple(Part(f"{folder}/{each}.jsonl", 0.5) for each in changes["dataset_mixture"])
        return mixed(folder, **{"save_updates": 1, **changes, **named, **more})

    tiny_pairs(folder / "c.jsonl", 5, seed=3)
    silent(config(was))
    path = folder / "whole" / "checkpoint-000001-0001"
    assert path.is_dir()
    again = config(now, output_dir=f"{folder}/other", resume_from_checkpoint=str(path))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        silent(again)
    result = silent(dataclasses.replace(again, resume_anyway=True))
    assert re.search(f"--resume_anyway: the data set starts from its beginning, because .*{why}", caplog.text)
    assert result["steps"] == again.max_steps
    assert len(read_metrics(folder / "other" / "metrics.jsonl")) == again.max_steps - 1


def test_data_that_cannot_go_on_is_refused_before_weights_are_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the checkpoint does not identify its rows, as one of an older version."""
    silent(mixed(folder, max_steps=2))
    path = folder / "whole" / "checkpoint-000001"
    rewrite(path, lambda state: (state["identity"].pop("rows"), state["feed"].pop()))
    monkeypatch.setattr("torch.distributed.checkpoint.load", lambda *_, **__: pytest.fail("weights were loaded"))
    again = mixed(folder, max_steps=2, output_dir=f"{folder}/other", resume_from_checkpoint=str(path))
    with pytest.raises(
        CheckpointError, match="does not fit the data of this run: the number of files or data sets was 1"
    ):
        silent(again)


def test_moved_files_within_a_rollout_batch(folder: Path) -> None:
    """The rows in flight name the earlier files. The accuracies by file are those of the same file names."""
    config = mixed(folder, max_steps=2, save_updates=1)
    silent(config)
    (folder / "moved").mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").rename(folder / "moved" / f"{name}.jsonl")
    parts = tuple(dataclasses.replace(part, dataset_name=f"{folder}/moved/{Path(part.dataset_name).name}")
                  for part in config.dataset_mixture)  # fmt: skip
    path = str(folder / "whole" / "checkpoint-000001-0001")
    silent(
        dataclasses.replace(config, dataset_mixture=parts, output_dir=f"{folder}/other", resume_from_checkpoint=path)
    )
    whole, other = (read_metrics(folder / name / "metrics.jsonl")[-1] for name in ("whole", "other"))
    assert untimed(whole) == untimed(other) and "train_accuracy/a" in other


def test_rows_by_share_with_their_aspects(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(row | {"aspect": "2"} if i == 0 else row) + "\n" for i, row in enumerate(rows))
    )
    for changes in ({}, {"streaming": True}):
        config = mixed(folder, rollout_batch_size=10, minibatch_size=5, max_steps=9, **changes)
        feed, longest = open_feed(config, load_dialog(config), Display(Console(quiet=True)))
        batches = [feed.next() for _ in range(feed.steps)]
        assert all(Counter(Path(source_of(row)).stem for row in batch) == {"a": 7, "b": 3} for batch in batches)
        seen = {row.source: row.aspect for batch in batches for row in batch}
        wanted = {f"{folder}/a.jsonl:{i}": "1" for i in range(2, 10)} | {
            f"{folder}/b.jsonl:{i}": None for i in range(1, 6)
        }
        assert seen == wanted | {f"{folder}/a.jsonl:1": "2"}, (
            "a column goes first, then the file's aspect, then the run's"
        )
        assert longest == (4096 if config.streaming else longest) > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_files_alike_come_in_orders_of_their_own(folder: Path, streaming: bool) -> None:
    (folder / "b.jsonl").write_text((folder / "a.jsonl").read_text())
    config = mixed(folder, streaming=streaming)
    feed, _ = open_feed(config, load_dialog(config), Display(Console(quiet=True)))
    a, b = ([source.draw().lines for _ in range(9)] for source in feed.sources)
    assert sorted(a) == sorted(b) and a != b


def test_one_file_gives_the_same_run_as_a_stream_of_the_same_order(folder: Path) -> None:
    """Training depends only on the rows, not on how they are stored."""
    options = {"dataset_mixture": (), "dataset_name": f"{folder}/b.jsonl", "rollout_batch_size": 5, "minibatch_size": 5}
    options |= {"max_steps": 1, "method": "bt"}
    silent(mixed(folder, **options))
    silent(mixed(folder, **options, streaming=True, output_dir=f"{folder}/stream"))
    log = [read_metrics(folder / name / "metrics.jsonl")[0] for name in ("whole", "stream")]
    assert log[0]["loss"] == pytest.approx(log[1]["loss"], rel=1e-5)


def test_what_a_stream_left_out_is_said_at_the_end(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    long_row(folder)
    with caplog.at_level("INFO", logger="dwrl_fast"):
        silent(mixed(folder, streaming=True, max_length=40))
    assert re.search(
        r"a\.jsonl: 17 rows drawn, read to the end; 8 groups used; 1 x longer than --max_length 40 tokens \(line 5\)",
        caplog.text,
    )
    assert "70.0 % of the mixture, about 17 rows of this run" in caplog.text
    with pytest.raises(DataError, match=r"no usable row in the whole of .*a\.jsonl: .* 9 x longer than --max_length 3"):
        silent(mixed(folder, streaming=True, max_length=3, output_dir=f"{folder}/short"))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        missing = (Part(f"{folder}/a.jsonl", 1.0), Part(f"{folder}/nowhere.jsonl", 1.0))
        silent(mixed(folder, dataset_mixture=missing, streaming=True, output_dir=f"{folder}/none"))


def test_accuracy_source_by_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = (Part(f"{folder}/a.jsonl"), Part(f"{folder}/b.jsonl"))
    config = mixed(folder, eval_dataset_name=held_out, max_steps=2, eval_steps=1, eval_votes=2)
    result = train.run(config, Console(width=100))
    printed = capsys.readouterr().out
    assert re.search(r"after dwrl.*\n│   a .*\n│   b ", printed)
    for when in ("before", "after"):
        for kind in ("", "_2_thoughts"):
            whole, a, b = (result[f"accuracy_{when}{kind}{name}"] for name in ("", "/a", "/b"))
            assert whole == pytest.approx((9 * a + 5 * b) / 14)
    assert result["report_after/a"]["groups"] == 9 and result["report_after/b"]["groups"] == 5
    log = read_metrics(folder / "whole/metrics.jsonl")
    assert {"eval_greedy", "eval_greedy/a", "eval_2_thoughts/b"} <= log[0].keys()
    for row in log:
        assert row["train_accuracy"] == pytest.approx(
            (3 * row["train_accuracy/a"] + row["train_accuracy/b"]) / 4
        ) or row["train_accuracy"] == pytest.approx((2 * row["train_accuracy/a"] + 2 * row["train_accuracy/b"]) / 4)


def test_evaluate_reports_each_of_several_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model_name_or_path", f"{folder}/tiny", "--dataset_name"]
    alone = [
        evaluate.run(parse_evaluate([*model, f"{folder}/{name}.jsonl"]), Console(quiet=True)) for name in ("a", "b")
    ]
    capsys.readouterr()
    both = evaluate.run(parse_evaluate([*model, f"{folder}/a.jsonl", f"{folder}/b.jsonl"]), Console(width=200))
    assert both.groups == 14
    printed = capsys.readouterr().out
    for name, report in zip("ab", alone, strict=True):
        assert re.search(
            rf"{name} +. +{report.accuracy:.3f} . {report.low:.3f} to {report.high:.3f} . +{report.groups} ", printed
        )


def scored(source: str, scores: list[float], ranks: tuple[int, ...] = ()) -> ScoredGroup:
    row = Preference(({"role": "user", "content": "?"},), ("y", "n"), ranks=ranks, source=source)
    return ScoredGroup(Group(row, [[], []]), [[score] for score in scores])


def test_reports_are_those_of_each_sources_groups(caplog: pytest.LogCaptureFixture) -> None:
    groups = [scored(f"x/a.jsonl:{i}", [1.0, 0.5 * i]) for i in range(5)]
    groups += [scored(f"b.parquet:{i}:1-2", [0.0, i - 1.0]) for i in range(4)]
    groups += [scored("c.jsonl:1-2", [1.0, 2.0], ranks=(1, 1))]
    warn_once.cache_clear()
    found = source_reports(groups, seed=3)
    assert list(found) == ["", "a", "b"] and "c has no accuracy of its own" in caplog.text
    for name, part in (("", groups), ("a", groups[:5]), ("b", groups[5:9])):
        report = dataclasses.replace(found[name], calibration_error=None)
        assert report == pair_report(marginal_scores(part), [found.group.ranks for found in part], 3)
        assert found[name].calibration_error is not None
    assert list(source_reports(groups[:5], 3)) == [""], "one source is no list of sources"
    names = {"x/a.jsonl": "a", "b.parquet": "b", "c.jsonl": "c", "d.jsonl": "d"}
    assert source_accuracy(groups, names) == {"a": pytest.approx(0.5), "b": pytest.approx(0.375)}
    assert source_accuracy([dataclasses.replace(group, scores=[]) for group in groups], names) == {}
