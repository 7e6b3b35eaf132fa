"""Disk faults: the disk is full, broken or read-only for one operation of a save; the folder vanishes; checkpoints are
damaged; the reader of the output is gone.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.reliability.drill import Drill
from bench.reliability.lives import Boundaries, die, lived
from bench.reliability.signals import command_line, struck
from bench.reliability.task import small, written
from dwrl_fast.config import TrainConfig
from dwrl_fast.embedded import Embedded
from dwrl_fast.training import saving
from dwrl_fast.training.checkpoint import checkpoints
from dwrl_fast.training.saving import Saver

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}
SHORT = {"max_steps": 3, "num_train_epochs": 1, "save_updates": 0, "save_total_limit": 2}


def failing(config: TrainConfig, folder: Path, number: int, code: int, fired: Path) -> None:
    """The command. In its second save, file operation `number` fails, and the file `fired` is created."""
    write, saves = saving.save_checkpoint, 0

    def fail() -> None:
        fired.touch()
        raise OSError(code, os.strerror(code), str(config.output_dir))

    watched = Boundaries(Path(str(config.output_dir)), number, fail)

    def watching(*arguments: Any, **options: Any) -> Path:
        nonlocal saves
        saves += 1
        watched.armed = saves == 2
        try:
            return write(*arguments, **options)
        finally:
            watched.armed = False
            if number == 0 and saves == 2:
                fired.write_text(str(watched.count))

    setattr(saving, "save_checkpoint", watching)  # noqa: B010 - mypy takes no assignment to a function of a module
    command_line(config, folder)


def refused(task: Embedded, folder: Path) -> Drill:
    """Every file operation of a save fails once with each fault. The run must log it, continue, and end with the right
    weights.
    """
    folder.mkdir(parents=True)
    count = folder / "count"
    config = small(task, folder / "whole", **SHORT)
    assert lived(lambda: failing(config, folder, 0, 0, count), folder / "whole.log") == 0
    expected, operations, wrong, done = written(folder / "whole"), int(count.read_text()), list[str](), 0
    for name, code in FAULTS.items():
        for number in range(1, operations + 1):
            done += 1
            run, fired = folder / f"{name}-{number}", folder / f"{name}-{number}.fired"
            log = run.with_suffix(".log")
            status = lived(partial(failing, small(task, run, **SHORT), folder, number, code, fired), log)
            said, left = log.read_text(encoding="utf-8"), [path.name for path in checkpoints(run)]
            if not fired.exists():
                wrong.append(f"{run.name}: the fault did not occur")
            elif status or "Traceback" in said or written(run) != expected:
                wrong.append(f"{run.name}: status {status}, or a different result")
            elif "checkpoint-000003" not in left or ("checkpoint-000002" not in left and os.strerror(code) not in said):
                wrong.append(f"{run.name}: {', '.join(left)}, or nothing is logged")
            shutil.rmtree(run)
    found = f"{done - len(wrong)} of {done} ({operations} operations, {', '.join(FAULTS)})" + "; ".join(
        ["", *wrong[:3]]
    )
    return Drill(
        "a disk that refuses one operation of a save",
        "an error is logged, the run continues to the right weights",
        found,
        not wrong,
    )


def vanished(task: Embedded, folder: Path) -> Drill:
    """The folder of the run is removed between two updates."""
    folder.mkdir(parents=True)
    run = folder / "run"
    log = folder / "run.log"
    strike = partial(shutil.rmtree, run)
    status = lived(partial(struck, small(task, run, **SHORT), folder, [("update", 6, strike)]), log)
    there = sorted(path.name for path in run.iterdir()) if run.exists() else []
    held = status == 0 and {"model", "result.json", "checkpoint-000003"} <= set(there)
    held = held and "Traceback" not in log.read_text(encoding="utf-8")
    return Drill(
        "the output folder vanishes", "the run continues and is saved", f"status {status}, {', '.join(there)}", held
    )


def unread(task: Embedded, folder: Path) -> Drill:
    """The output goes into a pipe that is closed after the first line, as with `| head -1`."""
    folder.mkdir(parents=True)
    config = small(task, folder / "run", **SHORT)
    config.save(folder / "options.yaml")
    command = [sys.executable, "-m", "dwrl_fast.train", "--config", str(folder / "options.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    there = {path.name for path in (folder / "run").iterdir()}
    held = process.returncode == 0 and "Traceback" not in said and {"model", "result.json", "curves.png"} <= there
    return Drill("a closed pipe", "no file is lost", f"status {process.returncode}, {len(there)} names", held)


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    """Remove the second half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Make the file empty."""
    os.truncate(path, 0)


DAMAGES: tuple[Callable[[Path], object], ...] = (flip, halve, empty, Path.unlink)


def damaged(task: Embedded, folder: Path) -> Drill:
    """Flip, truncate, empty and delete each file of the newest checkpoint, for checkpoints after and within a step."""
    folder.mkdir(parents=True)
    changes = SHORT | {"save_total_limit": None, "save_updates": 1}
    assert lived(lambda: command_line(small(task, folder / "whole", **changes), folder), folder / "whole.log") == 0
    expected, wrong, done = written(folder / "whole"), list[str](), 0
    for number, newest in ((5, "checkpoint-000001-0001"), (8, "checkpoint-000002")):
        begun = folder / newest
        saves = partial(_dying, small(task, begun, **changes), folder, number)
        lived(saves, folder / f"{newest}.log")
        assert checkpoints(begun)[-1].name == newest, checkpoints(begun)
        for file in sorted(path.name for path in (begun / newest).iterdir()):
            for damage in DAMAGES:
                done += 1
                run = folder / f"{newest}-{damage.__name__}-{file}"
                shutil.copytree(begun, run)
                damage(run / newest / file)
                log = run.with_suffix(".log")
                status = lived(lambda run=run: command_line(small(task, run, **changes), folder), log)  # type: ignore[misc]
                said = log.read_text(encoding="utf-8").replace("\n", "")
                if status or "SKIPPED" not in said or file not in said:
                    wrong.append(f"{run.name}: status {status}, or the file is not named")
                elif written(run) != expected:
                    wrong.append(f"{run.name}: a different result")
                shutil.rmtree(run)
    found = f"{done - len(wrong)} of {done}" + "; ".join(["", *wrong[:3]])
    return Drill(
        "damaged checkpoints",
        "the previous checkpoint is used, the file is named, equal weights: 20 of 20",
        found,
        not wrong,
    )


def _dying(config: TrainConfig, folder: Path, number: int) -> None:
    """The command. It dies when checkpoint `number` is on disk."""
    save, saves = Saver.save, 0

    def fatal(self: Saver, *arguments: Any) -> None:
        nonlocal saves
        save(self, *arguments)
        saves += 1
        if saves == number:
            self.finish()
            die()

    setattr(Saver, "save", fatal)  # noqa: B010
    command_line(config, folder)
