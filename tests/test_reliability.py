"""A sample of `python -m bench.reliability`: its drills pass, and fail if the planted fault does harm."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_embedded import TINY

from bench.reliability import cases, disks, files, kills, resume, signals
from bench.reliability.lives import lived
from bench.reliability.task import made
from dwrl_fast.embedded import Embedded
from dwrl_fast.errors import DataError
from dwrl_fast.training import checkpoint, in_flight

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    return made(tmp_path_factory.mktemp("task"), TINY)


@pytest.mark.parametrize("case", ["dwrl, minibatch", "dwrl, rollout", "dwrl, joint"])
def test_a_run_that_dies_after_every_update_is_the_run(task: Embedded, tmp_path: Path, case: str) -> None:
    drill = resume.resumed_everywhere(task, tmp_path / "drill", case, max_steps=2)
    assert drill.held, drill.found


def test_the_drill_sees_what_is_lost(task: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = in_flight.InFlight.restored

    def lossy(state: dict[str, Any], device: Any) -> Any:
        found = restored(state, device)
        found.groups.reverse()
        return found

    monkeypatch.setattr(in_flight.InFlight, "restored", lossy)
    drill = resume.resumed_everywhere(task, tmp_path / "drill", "dwrl, joint", max_steps=2)
    assert not drill.held


def test_kills_within_saves(tmp_path: Path) -> None:
    drill = kills.single(tmp_path / "drill", 40)
    assert drill.held, drill.found


def test_the_drill_sees_a_save_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder gets its final name before its files are written, and nothing is verified."""

    def hasty(folder: Path, final: Path, state: str, files: dict[str, Any]) -> None:
        folder.rename(final)
        checkpoint._write_rest(final, state, files)

    monkeypatch.setattr(checkpoint, "_complete", hasty)
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)
    drill = kills.single(tmp_path / "drill", 25)
    assert not drill.held and "cannot be read" in drill.found


def test_kills_of_one_of_two(tmp_path: Path) -> None:
    drill = kills.together(tmp_path / "drill", 3)
    assert drill.held, drill.found


def test_signals(task: Embedded, tmp_path: Path) -> None:
    drill = signals.signalled(task, tmp_path / "drill")
    assert drill.held, drill.found


@pytest.mark.parametrize("drill", [disks.vanished, disks.unread, disks.damaged])
def test_disks(task: Embedded, tmp_path: Path, drill: Any) -> None:
    found = drill(task, tmp_path / "drill")
    assert found.held, found.found


def test_a_disk_that_refuses(task: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "FAULTS", {"ENOSPC": disks.FAULTS["ENOSPC"]})
    drill = disks.refused(task, tmp_path / "drill")
    assert drill.held, drill.found


def test_hostile_files(task: Embedded, tmp_path: Path) -> None:
    assert len(list(cases.cases())) >= 100
    drill = files.hostile(task, tmp_path / "drill")
    assert drill.held, drill.found


def test_the_drill_of_files_sees_each_kind_of_harm(task: Embedded, tmp_path: Path) -> None:
    """Each case does something that no loader may do, and the verdict names it."""

    def wrong(loads: Any, **limits: float) -> str:
        folder = tmp_path / "case"
        folder.mkdir(exist_ok=True)
        (tmp_path / "log").unlink(missing_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "load", lambda *_: loads(folder))
            for name, limit in limits.items():
                patch.setattr(files, name, limit)
            return files.verdict(cases.Case("data", "", "rows.jsonl", named), folder, tmp_path / "log")

    def named(folder: Path) -> Any:
        raise DataError(f"{folder}/rows.jsonl")

    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").touch()
    assert wrong(named) == ""
    assert "Traceback" in wrong(lambda folder: 1 / 0)
    assert "status 0" in wrong(lambda folder: None)
    assert "no end within 2 s" in wrong(lambda folder: time.sleep(60), WAIT=2.0)
    assert "more than 0 s of proc" in wrong(lambda folder: (sum(range(10**7)), named(folder)), SECONDS=0.01)
    assert "MiB" in wrong(lambda folder: (b"x" * (1200 << 20), named(folder)))
    assert "outside was read" in wrong(lambda folder: ((folder.parent / "outside" / "x").read_bytes(), named(folder)))
    assert "code ran" in wrong(lambda folder: ((folder / "ran").mkdir(), named(folder)))


def test_a_life_ends_as_it_ends(tmp_path: Path) -> None:
    def ends() -> Iterator[tuple[int, Any]]:
        yield 0, lambda: print("said")
        yield 1, lambda: 1 / 0
        yield 7, lambda: exec("raise SystemExit(7)")
        yield -9, kills.die

    assert all(lived(run, tmp_path / "log") == status for status, run in ends())
    assert "said" in (tmp_path / "log").read_text() and "ZeroDivisionError" in (tmp_path / "log").read_text()
