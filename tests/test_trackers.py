"""The figures that experiment trackers get, read back from their storage."""

import dataclasses
import importlib.util
import json
import logging
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from rich.console import Console
from test_run_folder import killed_before
from tiny import tiny_config

from dwrl_fast import train
from dwrl_fast.config import TrainConfig
from dwrl_fast.data.mixture import Part
from dwrl_fast.errors import ConfigError
from dwrl_fast.training import trackers
from dwrl_fast.training.runlog import read_metrics
from dwrl_fast.training.trackers import NAMES, OF_ONE_PHASE, RECORD, hyperparameters, tracker_names

Told = dict[str, list[tuple[int, float]]]  # by name, the steps and values in the order of logging
Kept = tuple[dict[str, Any], list[dict[str, Any]]]  # the options, and the rows of the table of the first step


def config_of(folder: Path, *names: str, **changes: Any) -> TrainConfig:
    options = {"output_dir": str(folder / "run"), "save_steps": 2, "eval_steps": 2, "eval_votes": 2}
    options |= {"project": "tests", **changes}
    return tiny_config(folder, report_to=names, eval_dataset_name=(Part(f"{folder}/pairs.jsonl"),), **options)


def go(config: TrainConfig) -> dict[str, Any]:
    return train.run(config, Console(quiet=True))


def tensorboard_told(run: Path) -> Told:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format. After seven bytes there are blocks of 32 KiB. A record has parts,
    each with its size and a mark for the last part.
    """
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def wandb_told(run: Path) -> Told:
    """The figures in the two files of a run that was resumed offline."""
    from wandb.proto import wandb_internal_pb2

    told: Told = {}
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    name, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
                    if isinstance(value, int | float) and not name.startswith("_"):
                        told.setdefault(name, []).append((record.history.step.num, value))
    return told


def mlflow_told(run: Path) -> Told:
    import mlflow

    client, known = mlflow.MlflowClient(), json.loads((run / RECORD).read_text())["mlflow"]["run"]
    names = client.get_run(known).data.metrics
    return {name: [(each.step, each.value) for each in client.get_metric_history(known, name)] for name in names}


def trackio_told(run: Path) -> Told:
    from trackio.sqlite_storage import SQLiteStorage

    known = json.loads((run / RECORD).read_text())["trackio"]["run"]
    told: Told = {}
    for row in SQLiteStorage.get_logs("tests", known):
        for name, value in row.items():
            if name.startswith(("train/", "eval/")):
                told.setdefault(name, []).append((row["step"], value))
    return told


def tensorboard_kept(run: Path) -> Kept:
    (options,) = (run / "tensorboard").glob("*/hparams.yml")
    return yaml.safe_load(options.read_text()), []


def trackio_kept(run: Path) -> Kept:
    from trackio.sqlite_storage import SQLiteStorage

    known = json.loads((run / RECORD).read_text())["trackio"]["run"]
    tables = {row["step"]: row["thoughts"] for row in SQLiteStorage.get_logs("tests", known) if "thoughts" in row}
    options = SQLiteStorage.get_run_config("tests", known)
    assert options is not None
    return options, tables[1]["_value"]


def wandb_kept(run: Path) -> Kept:
    from wandb.proto import wandb_internal_pb2

    first, _ = sorted((run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    records = [
        wandb_internal_pb2.Record.FromString(data) for data in wandb_records(next(first.glob("*.wandb")).read_bytes())
    ]
    options = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    (table,) = (json.loads(path.read_text()) for path in first.glob("files/media/table/thoughts_0_*.json"))
    return options, [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def mlflow_kept(run: Path) -> Kept:
    import mlflow

    known = json.loads((run / RECORD).read_text())["mlflow"]["run"]
    table = mlflow.artifacts.load_dict(f"runs:/{known}/thoughts/step-000001.json")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return mlflow.MlflowClient().get_run(known).data.params, rows


KEPT: dict[str, Callable[[Path], Kept]] = {
    "tensorboard": tensorboard_kept,
    "trackio": trackio_kept,
    "wandb": wandb_kept,
    "mlflow": mlflow_kept,
}
READERS: dict[str, Callable[[Path], Told]] = {
    "tensorboard": tensorboard_told,
    "trackio": trackio_told,
    "wandb": wandb_told,
    "mlflow": mlflow_told,
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "mlflow")]


@pytest.fixture(params=["tensorboard", "trackio", *SLOW])
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it on import
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("accelerate")
    pytest.importorskip(request.param)
    return str(request.param)


def test_a_tracker_is_told_each_step_once_under_the_documented_names(folder: Path, tracker: str) -> None:
    """Also if the run was killed after its last checkpoint, so that it repeats steps that the tracker already has."""
    config = config_of(folder, tracker)
    with killed_before(3):
        go(config)
    result = go(dataclasses.replace(config, resume_from_checkpoint="latest"))
    told, rows = READERS[tracker](folder / "run"), read_metrics(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name, figures in told.items():
        steps = [step for step, _ in figures]
        assert steps == sorted(set(steps)), f"{name}: no step twice, none before another"
    timed = re.compile("step_time|share_|per_second")  # the killed run had other times in its last step
    for row in rows:
        named = tracker_names({name: value for name, value in row.items() if name != "step"})
        named = {name: value for name, value in named.items() if row["step"] != 3 or not timed.search(name)}
        assert {name: dict(told[name])[row["step"]] for name in named} == pytest.approx(named, rel=1e-6)
    for kind in ("", "_2_thoughts"):
        found = dict(told[f"eval/accuracy{kind}"])
        assert set(found) == {0, 2, 4}
        before, after = (result[f"report_{when}{kind}"]["accuracy"] for when in ("before", "after"))
        assert (found[0], found[4]) == pytest.approx((before, after))
    options, rows = KEPT[tracker](folder / "run")
    assert options["method"] == "dwrl" and int(options["max_steps"]) == 4 and options["report_to"] == f'["{tracker}"]'
    written = [json.loads(line) for line in (folder / "run" / "thoughts" / "step-000001.jsonl").open()]
    assert [row["thought"] for row in rows] == [row["thought"] for row in written if tracker != "tensorboard"]


def test_the_names_of_the_figures() -> None:
    of_two = {"learning_rate_score": 1.0, "learning_rate_thought": 2.0, "grad_norm_score": 3.0, "label_mass": None}
    assert tracker_names(of_two) == {
        "train/learning_rate_score": 1.0,
        "train/learning_rate_thought": 2.0,
        "train/grad_norm_score": 3.0,
    }
    of_one = {"learning_rate_joint": 1.0, "grad_norm_joint": 2.0, "loss": 0.5, "share_sampling": 0.1}
    assert tracker_names(of_one) == {
        "train/learning_rate": 1.0,
        "train/grad_norm": 2.0,
        "train/loss": 0.5,
        "train/share_sampling": 0.1,
    }
    evaluated = {"eval_greedy": 0.5, "eval_4_thoughts": 0.6, "eval_greedy/chat": 0.7, "eval_4_thoughts/a:b": 0.8}
    assert tracker_names(evaluated) == {
        "eval/accuracy": 0.5,
        "eval/accuracy_4_thoughts": 0.6,
        "eval/chat_accuracy": 0.7,
        "eval/a_b_accuracy_4_thoughts": 0.8,
    }


def test_the_documented_names_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("## Trackers")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| `(train/[\w/]+)` \|", text, re.M))
    assert shown == NAMES | OF_ONE_PHASE


def test_the_names_are_trls() -> None:
    """They are in the installed source of TRL's trainers."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "trainer"
    source = "".join((folder / f"{name}_trainer.py").read_text() for name in ("grpo", "reward", "dpo"))
    own = {"loss", "learning_rate", "grad_norm"}  # from transformers' Trainer
    theirs = {name.removeprefix("train/") for name in (NAMES | OF_ONE_PHASE).values()} - own
    assert [name for name in theirs if f'"{name}"' not in source] == []


def test_the_options_are_hyperparameters(folder: Path) -> None:
    found = hyperparameters(config_of(folder, "tensorboard"))
    assert found["method"] == "dwrl" and found["max_steps"] == 4 and found["learning_rate"] == 1e-2
    assert found["report_to"] == '["tensorboard"]' and found["max_minutes"] == "null"
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "no_such_tracker").mkdir()  # a folder without modules, as trackers write, is not a package
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ConfigError, match=r"pip install (accelerate )?no_such_tracker$"):
        trackers.check_installed(["no_such_tracker"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    argv = ["--report_to", "wandb", "mlflow", "--output_dir", f"{folder}/run", "--dry_run"]
    with pytest.raises(
        ConfigError, match=r"not installed: pip install accelerate wandb mlflow-skinny sqlalchemy alembic$"
    ):
        train.main(argv)


def test_a_tracker_that_cannot_begin_is_refused_before_the_work(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    (folder / "run").mkdir()
    (folder / "run" / "tensorboard").write_text("a file where its folder would be")
    with pytest.raises(ConfigError, match=r"--report_to tensorboard cannot start \(.*Error: .*Correct this, or leave"):
        go(config_of(folder, "tensorboard"))
    assert not (folder / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_fails_on_the_way_is_given_up_and_the_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    tracking = pytest.importorskip("accelerate.tracking")
    told = tracking.TensorBoardTracker.log

    def log(self: Any, values: Any, step: int, **more: Any) -> None:
        if step >= 2:
            raise OSError(28, "No space left on device")
        told(self, values, step=step, **more)

    monkeypatch.setattr(tracking.TensorBoardTracker, "log", log)
    with caplog.at_level(logging.ERROR, logger="dwrl_fast"):
        assert go(config_of(folder, "tensorboard"))["steps"] == 4
    said = [record.getMessage() for record in caplog.records if "tensorboard failed" in record.getMessage()]
    assert len(said) == 1 and "No space left on device" in said[0]
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [step for step, _ in tensorboard_told(folder / "run")["train/loss"]] == [1]
    assert json.loads((folder / "run" / RECORD).read_text())["tensorboard"]["last"] == 1


def test_without_the_option_nothing_is_told(folder: Path) -> None:
    go(config_of(folder))
    assert not {RECORD, "tensorboard", "wandb", "mlruns"} & {path.name for path in (folder / "run").iterdir()}
