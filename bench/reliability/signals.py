"""Tests that SIGTERM and SIGINT save a checkpoint, log it, and exit with 143 and 130, and that the resumed run equals
an uninterrupted one.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from bench.reliability.drill import Drill
from bench.reliability.lives import lived
from bench.reliability.task import small, written
from dwrl_fast import train
from dwrl_fast.config import TrainConfig
from dwrl_fast.console import command
from dwrl_fast.embedded import Embedded
from dwrl_fast.training.checkpoint import checkpoints
from dwrl_fast.training.trainer import Trainer

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def command_line(config: TrainConfig, folder: Path) -> None:
    """The training command in this process, with its signal handlers."""
    file = folder / "options.yaml"
    config.save(file)
    os.environ["COLUMNS"] = "1000"  # so that messages are not wrapped
    torch.set_num_threads(1)
    sys.argv = [
        "train",
        "--config",
        str(file),
        "--output_dir",
        str(config.output_dir),
        "--resume_from_checkpoint",
        "auto",
    ]
    command(train.main, ranks=True)


def struck(config: TrainConfig, folder: Path, strikes: Iterable[tuple[str, int, Callable[[], object]]]) -> None:
    """The command with strikes (method of Trainer, number, function): the function is called before that call of the
    method.
    """
    for name, place, strike in strikes:
        setattr(Trainer, name, _counted(getattr(Trainer, name), place, strike))
    command_line(config, folder)


def _counted(method: Callable[..., object], place: int, strike: Callable[[], object]) -> Callable[..., object]:
    calls = 0

    def watched(self: Trainer, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == place:
            strike()
        return method(self, *arguments)

    return watched


def send(number: int) -> None:
    """Send a signal to this process; it is handled when this returns."""
    os.kill(os.getpid(), number)


def twice(number: int) -> None:
    """Send a signal twice: the first one is noted, the second one ends the process."""
    send(number)
    time.sleep(0.1)
    send(number)


def signalled(task: Embedded, folder: Path) -> Drill:
    """Each signal during a rollout, within an update, in the last update of a step, and twice."""
    folder.mkdir(parents=True)
    changes = {"save_steps": 0, "save_updates": 0, "max_steps": 3, "num_train_epochs": 1}
    assert lived(lambda: command_line(small(task, folder / "whole", **changes), folder), folder / "whole.log") == 0
    expected, wrong, done = written(folder / "whole"), list[str](), 0
    for number in STATUS:
        for name, place, how in (
            ("_roll_out", 2, send),
            ("update", 6, send),
            ("update", 8, send),
            ("update", 6, twice),
        ):
            done += 1
            run = folder / f"{signal.Signals(number).name}-{name}-{place}-{how.__name__}"
            config, log = small(task, run, **changes), run.with_suffix(".log")
            status = lived(partial(struck, config, folder, [(name, place, partial(how, number))]), log)
            saved, said = checkpoints(run), log.read_text(encoding="utf-8")
            if status != STATUS[number] or "Traceback" in said or bool(saved) != (how is send):
                wrong.append(f"{run.name}: status {status}, {len(saved)} checkpoints")
            elif how is send and "saves a checkpoint" not in said:
                wrong.append(f"{run.name}: it does not log that it saves")
            elif lived(lambda config=config: command_line(config, folder), log) != 0 or written(run) != expected:  # type: ignore[misc]
                wrong.append(f"{run.name}: the resumed run is different")
    found = f"{done - len(wrong)} of {done}" + "; ".join(["", *wrong[:3]])
    return Drill(
        "SIGTERM and SIGINT", "143 and 130, saved, resumed bit for bit; a second signal ends at once", found, not wrong
    )
