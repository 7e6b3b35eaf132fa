"""The folder of a run: one run at a time, finished runs are unchanged, and the effect of damaged checkpoints."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from rich.console import Console
from safetensors.torch import load_file
from test_checkpoint import flip_byte
from tiny import tiny_config, tiny_pairs

from dwrl_fast import compare, evaluate, train
from dwrl_fast.config import TrainConfig
from dwrl_fast.console import command
from dwrl_fast.data.mixture import Part
from dwrl_fast.embedded import Warmup
from dwrl_fast.errors import CheckpointError, ConfigError
from dwrl_fast.lock import sole_writer
from dwrl_fast.progress import Display
from dwrl_fast.training.checkpoint import checkpoints, save_checkpoint
from dwrl_fast.training.runlog import RunLog, read_metrics

HOLDER = """
import sys, time
from pathlib import Path
from dwrl_fast.lock import sole_writer
with sole_writer(Path(sys.argv[1]), "its run"):
    print("held", flush=True)
    time.sleep(600)
"""


def config_of(folder: Path, run: str = "run", **changes: Any) -> TrainConfig:
    return tiny_config(folder, **{"output_dir": str(folder / run), "save_steps": 1, "max_steps": 3, **changes})


def go(config: TrainConfig, resume: str | None = None) -> dict[str, Any]:
    return train.run(dataclasses.replace(config, resume_from_checkpoint=resume), Console(quiet=True))


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its content and the time at which it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


class Killed(Exception):
    pass


@contextmanager
def killed_before(step: int) -> Iterator[None]:
    """A context in which a run is killed after it logs the step that follows `step`, before it saves that step."""
    begun = RunLog.metrics

    def metrics(self: RunLog, now: int, values: Any) -> None:
        begun(self, now, values)
        if now > step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "metrics", metrics)
        yield


# One run at a time


def holder(folder: Path) -> subprocess.Popen:
    """Another process that writes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_goes(folder: Path) -> None:
    first = holder(folder / "run")
    try:
        for resume in (None, "latest"):
            with pytest.raises(ConfigError, match=r"another process is writing its run into .*run: wait for it, or"):
                go(config_of(folder), resume)
        assert [path.name for path in (folder / "run").iterdir()] == [".lock"], "nothing was written"
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert go(config_of(folder))["steps"] == 3


@pytest.mark.slow
def test_two_commands_in_one_folder(folder: Path) -> None:
    """The real command runs twice. The second process ends with an error, and the first one completes its run."""
    config_of(folder, max_steps=1).save(folder / "options.yaml")
    argv = [sys.executable, "-m", "dwrl_fast.train", "--config", f"{folder}/options.yaml"]
    both = [
        subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in "ab"
    ]
    said = [process.communicate()[1] for process in both]
    status = [process.returncode for process in both]
    assert sorted(status) == [0, 2], said
    assert re.search("another process is writing its run into|holds .* already", said[status.index(2)])
    assert "Traceback" not in said[status.index(2)]
    assert json.loads((folder / "run" / "result.json").read_text())["steps"] == 1


def test_the_lock_is_held_for_as_long_as_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    def second(*_: Any, **__: Any) -> dict[str, Any]:
        with pytest.raises(ConfigError, match="another process is writing"):
            go(config_of(folder), "latest")
        inside.append("refused")
        return {"seconds_by_stage": {}}

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", second)
        patch.setattr(train, "write_card", lambda *_, **__: None)
        go(config_of(folder))
    assert inside == ["refused"]
    with sole_writer(folder / "run", "its run"):
        pass


def test_the_folder_of_the_bt_run_is_locked_and_refused_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded task trains `bt` in a subfolder. Its slow parts are replaced here, because they take minutes."""
    parts: dict[str, Any] = dict.fromkeys(("train", "dev", "test"), folder / "pairs.jsonl")
    made = train.embedded.Embedded(folder / "tiny", **parts, seconds=0.0, state={})
    monkeypatch.setattr(train, "make_embedded", lambda *_: made)
    small, configure = ["--max_steps", "1", "--rollout_batch_size", "4", "--minibatch_size", "4"], train.configure
    monkeypatch.setattr(train, "configure", lambda argv: configure([*argv, *small]))
    config = train.configure(["--output_dir", f"{folder}/run"])
    below = folder / "run" / "bt"
    below.mkdir(parents=True)
    with sole_writer(below, "its run"):
        with pytest.raises(ConfigError, match=r"holds bt already"):
            go(config)
        with pytest.raises(ConfigError, match=r"another process is writing its run into .*/bt: "):
            go(config, "latest")
    found = go(config, "latest")
    assert "accuracy_bt" in found and found["trained"] is True


def test_the_embedded_task_of_other_options_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = train.embedded.Sizes(train=16, dev=4, test=4)
    plan = Warmup(hidden_size=16, layers=1, heads=2, intermediate_size=32, batch_size=8, stages=())
    prepare = train.embedded.prepare
    monkeypatch.setattr(train.embedded, "prepare", partial(prepare, sizes=sizes, plan=plan))
    config, display = TrainConfig(method="dwrl"), Display(Console(quiet=True))
    below = folder / "run" / "embedded"
    made = train.make_embedded(below, config, display)
    assert train.make_embedded(below, config, display) == made and not caplog.text
    changes: tuple[dict[str, Any], ...] = ({"seed": 1}, {"easy_fraction": 0.2})
    for change in changes:
        ((name, value),) = change.items()
        with pytest.raises(ConfigError, match=rf"{below} holds .* other options: --{name} was 0.*, is {value}"):
            train.make_embedded(below, dataclasses.replace(config, **change), display)
    record = below / train.embedded.RECORD
    older = json.loads(record.read_text())
    del older["drawn"]
    record.write_text(json.dumps(older))
    assert train.make_embedded(below, config, display) == dataclasses.replace(made, drawn=None)
    assert "was written by an older version, which did not store how it was drawn" in caplog.text


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "run" / ".lock").mkdir(parents=True)  # even root cannot write a file over a folder
    with pytest.raises(ConfigError, match=r"--output_dir .*run cannot be written to"):
        go(config_of(folder))


def test_a_file_system_without_locks_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with sole_writer(folder, "its run"):
        assert "cannot be locked here (No locks available)" in caplog.text


@pytest.mark.parametrize("main", [evaluate.main, compare.main])
def test_several_processes_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None]
) -> None:
    monkeypatch.setattr(sys, "argv", ["it", "--help"])
    for size, status in (("2", 2), ("1", 0)):
        monkeypatch.setenv("WORLD_SIZE", size)  # as torchrun sets it
        with pytest.raises(SystemExit) as end:
            command(main)
        assert (end.value.code or 0) == status
        assert (
            "WORLD_SIZE = 2: only dwrl_fast.train and dwrl_fast.doctor run as several processes;"
            in capsys.readouterr().err
        ) == (status == 2)


def test_training_refuses_several_processes_that_have_no_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train", "--output_dir", str(folder / "run")])
    with pytest.raises(SystemExit) as end:
        command(train.main, ranks=True)
    assert end.value.code == 2
    assert "WORLD_SIZE = 2 without RANK: start several processes with torchrun" in capsys.readouterr().err
    assert not (folder / "run").exists()


# Finished runs


@pytest.mark.parametrize("gone", [False, True])
def test_a_finished_run_is_left_as_it_is(folder: Path, caplog: pytest.LogCaptureFixture, gone: bool) -> None:
    config = config_of(folder)
    first = go(config)
    if gone:
        for path in checkpoints(folder / "run"):
            shutil.rmtree(path)
    before = content(folder / "run")
    with caplog.at_level("INFO", logger="dwrl_fast"):
        again = go(config, "latest")
    assert again == json.loads((folder / "run" / "result.json").read_text()) and again["steps"] == first["steps"]
    assert "holds the finished run: nothing was left to do" in caplog.text
    assert content(folder / "run") == before
    changes: tuple[dict[str, Any], ...] = ({"seed": 1}, {"max_steps": 5})
    for change in changes:
        with pytest.raises(ConfigError, match=f"a finished run with other options .{next(iter(change))} was"):
            go(dataclasses.replace(config, **change), "latest")
    with pytest.raises(ConfigError, match="holds a finished run, which is never overwritten"):
        go(config, str(folder / "run" / "checkpoint-000003"))
    assert content(folder / "run") == before


@pytest.mark.parametrize("damaged", ["result", "model"])
def test_a_finished_run_that_lost_something_makes_it_again(folder: Path, damaged: str) -> None:
    config = config_of(folder)
    go(config)
    weights = (folder / "run" / "model" / "model.safetensors").read_bytes()
    if damaged == "result":
        (folder / "run" / "result.json").write_text("{")
    else:
        shutil.rmtree(folder / "run" / "model")
    with pytest.raises(CheckpointError, match=r"Remove .*result.json: the same command then writes it again"):
        go(config, "latest")
    (folder / "run" / "result.json").unlink()
    go(config, "latest")
    assert (folder / "run" / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("resume", ["latest", "elsewhere"])
def test_a_model_without_its_checkpoints_is_not_written_over(folder: Path, resume: str) -> None:
    go(config_of(folder))
    go(config_of(folder, "other"))
    (folder / "run" / "result.json").unlink()
    for each in checkpoints(folder / "run"):
        shutil.rmtree(each)
    before = content(folder / "run")
    path = resume if resume == "latest" else str(folder / "other" / "checkpoint-000002")
    with pytest.raises(CheckpointError, match=r"run holds model of a finished run"):
        go(config_of(folder), path)
    assert content(folder / "run") == before


def test_latest_starts_a_run_that_is_not_there(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(config_of(folder, "plain"))
    with caplog.at_level("INFO", logger="dwrl_fast"):
        go(config_of(folder, "below/new"), "latest")
    said = [message for message in caplog.messages if "no checkpoint to resume from" in message]
    assert said == [f"{folder}/below/new holds no checkpoint to resume from: the run starts from the beginning."]
    assert all(torch.equal(p, weights(folder / "below/new")[name]) for name, p in weights(folder / "plain").items())


def test_a_run_killed_before_its_first_checkpoint_starts_again(folder: Path) -> None:
    config = config_of(folder)
    with killed_before(0):
        go(config)
    assert read_metrics(folder / "run" / "metrics.jsonl") and not checkpoints(folder / "run")
    assert go(config, "latest")["steps"] == 3
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_without_an_accuracy_before_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its table, model card, result and curves are complete without it."""
    with killed_before(1):
        go(config_of(folder))
    files = tuple(Part(str(tiny_pairs(folder / f"{name}.jsonl", 5, seed))) for name, seed in (("a", 7), ("b", 8)))
    config = config_of(folder, eval_dataset_name=files, eval_votes=0, report_to=("tensorboard",))
    train.run(dataclasses.replace(config, resume_from_checkpoint="latest"), Console(width=100))
    printed = capsys.readouterr().out
    assert re.search(r"after dwrl.*\n│   a .*\n│   b ", printed) and "before" not in printed
    result = json.loads((folder / "run" / "result.json").read_text())
    assert "accuracy_after/a" in result and not any("before" in name for name in result)
    card = (folder / "run" / "model" / "README.md").read_text()
    assert "| after |" in card and "| before" not in card and (folder / "run" / "curves.png").exists()


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoints", "metrics"])
def test_a_checkpoint_of_another_folder_does_not_overwrite_a_run(folder: Path, saved: bool) -> None:
    go(config_of(folder, "other", seed=1))
    with killed_before(1):
        go(config_of(folder, save_steps=int(saved)))
    before = content(folder / "run")
    path = folder / "other" / "checkpoint-000002"
    held = "checkpoint-000001, metrics.jsonl of a run that .*checkpoint latest" if saved else "metrics.jsonl of a run"
    for arguments in ([], ["--dry_run"]):
        with pytest.raises(CheckpointError, match=rf"{folder}/run holds {held}") as refused:
            config = config_of(folder, seed=1)
            config.save(folder / "options.yaml")
            train.main(["--config", f"{folder}/options.yaml", "--resume_from_checkpoint", str(path), *arguments])
        assert "give another --output_dir" in str(refused.value) and str(path) in str(refused.value)
    assert content(folder / "run") == before
    resumed = config_of(folder, "new", seed=1)
    assert go(resumed, str(path))["steps"] == 3, "the remedy works"


@pytest.mark.parametrize(
    ("name", "after"),
    [("checkpoint-000001", 1), ("checkpoint-000001-0002", 1), ("checkpoint-000001-0002", 2)],
    ids=["no checkpoint of its own", "no checkpoint of its own, within a step", "a checkpoint of its own"],
)
def test_a_run_from_a_checkpoint_of_another_folder_goes_on_by_the_same_command(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, after: int
) -> None:
    go(config_of(folder, "other", save_updates=1))
    config, path = config_of(folder), str(folder / "other" / name)
    with killed_before(after):
        go(config, path)
    assert bool(checkpoints(folder / "run")) == (after == 2)
    before = content(folder / "run")
    if after == 2:
        with pytest.raises(CheckpointError, match=r"of a run that .*checkpoint-000002 does not belong to"):
            go(config, str(folder / "other" / "checkpoint-000002"))
        assert content(folder / "run") == before
    assert go(config, path)["steps"] == 3
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl")] == [2, 3]
    assert sorted(os.listdir(folder / "run" / "thoughts")) == ["step-000002.jsonl", "step-000003.jsonl"]
    assert all(torch.equal(p, weights(folder / "other")[name]) for name, p in weights(folder / "run").items())
    with caplog.at_level("INFO", logger="dwrl_fast"):
        go(config, path)
    assert "holds the finished run: nothing was left to do" in caplog.text
    assert f"began from {path} and continues from its own newest checkpoint" in caplog.text


def test_the_origin_of_a_run_stays_known_when_it_is_resumed(folder: Path) -> None:
    go(config_of(folder, "other"))
    config, path = config_of(folder, save_total_limit=1), str(folder / "other" / "checkpoint-000001")
    with killed_before(2):
        go(config, path)
    with killed_before(2):
        go(config, "latest")
    train.main(["--config", f"{folder}/run/config.yaml", "--resume_from_checkpoint", path, "--dry_run"])
    assert go(config, path)["steps"] == 3


# Damaged checkpoints


def test_a_damaged_newest_checkpoint_is_set_aside(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, run = config_of(folder, max_steps=4), folder / "run"
    go(dataclasses.replace(config, output_dir=str(folder / "whole")))
    with killed_before(3):
        go(config)
    names = [path.name for path in checkpoints(run)]
    assert names == [f"checkpoint-00000{step}" for step in (1, 2, 3)]
    (run / "checkpoint-000003.damaged").mkdir()  # from an earlier run
    for name in names[1:]:
        flip_byte(run / name)
    damaged = {name: {k: text for k, (_, text) in content(run / name).items()} for name in names[1:]}
    with pytest.raises(CheckpointError, match="checkpoint-000002, which is later than"):
        go(config, str(run / "checkpoint-000001"))
    assert [path.name for path in checkpoints(run)] == names, "only latest may move them"
    assert go(config, "latest")["steps"] == 4
    for name, aside in zip(names[1:], ("checkpoint-000002.damaged", "checkpoint-000003.damaged-2"), strict=True):
        assert f"{run / name} is damaged and was renamed to {aside}." in caplog.text
        assert {k: text for k, (_, text) in content(run / aside).items()} == damaged[name], "nothing of it is lost"
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-00000{step}" for step in (1, 2, 3, 4)]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert all(torch.equal(p, weights(run)[name]) for name, p in weights(folder / "whole").items())


def test_without_a_whole_checkpoint_nothing_begins_anew(folder: Path) -> None:
    config = config_of(folder)
    with killed_before(2):
        go(config)
    for path in checkpoints(folder / "run"):
        flip_byte(path)
    before = content(folder / "run")
    with pytest.raises(CheckpointError, match="holds checkpoints, but none is intact"):
        go(config, "latest")
    assert content(folder / "run") == before
    for path in checkpoints(folder / "run"):
        path.rename(path.with_name("moved-" + path.name))
    assert go(config, "latest")["steps"] == 3, "the remedy works"


def test_another_runs_damaged_checkpoint_stays_where_it_is(folder: Path) -> None:
    config = config_of(folder)
    with killed_before(2):
        go(config)
    flip_byte(folder / "run" / "checkpoint-000002")
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        go(dataclasses.replace(config, seed=1), "latest")
    assert (folder / "run" / "checkpoint-000002").exists()


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, {"a": torch.zeros(1)}, {})
    assert [path.name for path in checkpoints(tmp_path, past=(999_999, 0))] == ["checkpoint-1000000"]
    assert checkpoints(tmp_path, past=(1_000_000, 0)) == []


def test_the_log_drops_thoughts_past_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.thoughts_folder.mkdir()
    for name in ("step-000002", "step-000003", "step-1000000", "step-mine"):
        (log.thoughts_folder / f"{name}.jsonl").write_text("{}\n")
    RunLog(tmp_path, resumed_at=2)
    assert sorted(os.listdir(log.thoughts_folder)) == ["step-000002.jsonl", "step-mine.jsonl"]


def test_a_dry_run_says_that_a_folder_cannot_be_made(folder: Path) -> None:
    (folder / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match=f"--output_dir .*{name} cannot be made"):
            train.main(["--dry_run", "--output_dir", str(folder / name)])
