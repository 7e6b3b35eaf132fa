"""Checkpoints in the background: a consistent copy, one write at a time, and disk errors do not end the run."""

import dataclasses
import errno
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import blank
from test_trainer import make_trainer
from tiny import tiny_config, tiny_pairs

from dwrl_fast.errors import CheckpointError
from dwrl_fast.ranks import ALONE
from dwrl_fast.training import checkpoint, saving
from dwrl_fast.training.checkpoint import checkpoints, load_checkpoint
from dwrl_fast.training.saving import Saver


def held_up(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event; no checkpoint is written before it is set."""
    event, save = threading.Event(), saving.save_checkpoint

    def waiting(*arguments: Any, **options: Any) -> Path:
        assert event.wait(60)
        return save(*arguments, **options)

    monkeypatch.setattr(saving, "save_checkpoint", waiting)
    return event


def test_what_is_written_is_what_was_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = held_up(monkeypatch)
    tensors = {"weight": torch.nn.Parameter(torch.arange(4.0)), "strided": torch.arange(6.0).reshape(2, 3).t()}
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    saver = Saver(tmp_path, None, ALONE, beside=True)
    saver.save((1, 0), tensors, {"a": 1})
    for tensor in tensors.values():
        tensor.data.fill_(-1)
    assert not checkpoints(tmp_path)
    event.set()
    assert saver.finish()
    into = blank(expected)
    assert load_checkpoint(tmp_path / "checkpoint-000001", into) == {"a": 1}
    assert all(torch.equal(into[name], tensor) for name, tensor in expected.items())
    saver.save((1, 0), tensors, {"a": 1})  # the same place is not saved twice
    saver.save((1, 1), tensors, {"a": 2})
    assert saver.finish() and [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-000001",
        "checkpoint-000001-0001",
    ]


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = held_up(monkeypatch)
    saver = Saver(tmp_path, None, ALONE, beside=True)
    saver.save((1, 0), {"a": torch.zeros(1)}, {})
    threading.Timer(0.1, event.set).start()
    saver.save((2, 0), {"a": torch.ones(1)}, {})
    assert checkpoints(tmp_path)[0].name == "checkpoint-000001"
    assert saver.finish() and len(checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("beside", [True, False])
def test_a_disk_that_refuses_is_said_and_the_next_save_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, beside: bool
) -> None:
    saver, sync = Saver(tmp_path, 1, ALONE, beside=beside), checkpoint._sync
    saver.save((1, 0), {"a": torch.zeros(1)}, {})
    assert saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        saver.save((2, 0), {"a": torch.ones(1)}, {})
        assert not saver.finish()
    assert "checkpoint-000002 could not be written: [Errno 28] No space left" in caplog.text
    assert "The run continues without it" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    monkeypatch.setattr(checkpoint, "_sync", sync)
    saver.save((2, 0), {"a": torch.ones(1)}, {})
    assert saver.finish() and [path.name for path in tmp_path.iterdir()] == ["checkpoint-000002"]


def test_any_other_error_is_raised(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 1, ALONE, beside=True)
    saver.save((1, 0), {}, {"a": (1, 2)})
    with pytest.raises(CheckpointError, match="tuples"):
        saver.finish()


def strikes(folder: Path, what: str) -> Callable[[], object]:
    """Replace a file by a folder, or a folder by a file. Permissions would not stop root."""

    def strike() -> None:
        path = folder / what
        if path.exists():
            path.rename(path.with_name("was-" + path.name))
        path.mkdir() if path.suffix else path.write_text("")

    return strike


@pytest.mark.parametrize("what", ["metrics.jsonl", "thoughts"])
def test_a_log_that_cannot_be_written_ends_no_run(folder: Path, caplog: pytest.LogCaptureFixture, what: str) -> None:
    from test_resume import struck

    with caplog.at_level(logging.ERROR, logger="dwrl_fast"), struck(6, strikes(folder / "run", what)):
        assert make_trainer(tiny_config(folder), folder / "run").train()["steps"] == 4
    assert f"run/{what}" in caplog.text


def test_the_best_checkpoint_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unseen = tiny_pairs(folder / "unseen.jsonl", 4, seed=1)
    config = tiny_config(folder, max_steps=6, save_steps=2, save_total_limit=1, eval_steps=1, eval_votes=0)
    trainer = make_trainer(config, folder / "run", unseen)
    accuracies = iter([0.1, 0.5, 0.9, 0.4, 0.9, 0.2])
    evaluate = trainer.evaluate

    def told(name: str) -> Any:
        found = evaluate(name)
        if name.startswith("step"):
            found["greedy"] = dataclasses.replace(found["greedy"], accuracy=next(accuracies))
        return found

    monkeypatch.setattr(trainer, "evaluate", told)
    trainer.train()
    assert [path.name for path in checkpoints(folder / "run")] == ["checkpoint-000003", "checkpoint-000006"]
    assert trainer.best is not None and trainer.best.accuracy == 0.9
