"""Long runs of the embedded task. A run that is killed about every minute must give the weights of an undisturbed run,
and memory and descriptors of an undisturbed run must stay constant.
"""

import os
import random
import signal
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.reliability.drill import Drill
from bench.reliability.lives import ended, life, lived
from bench.reliability.task import run, small, written
from dwrl_fast.embedded import Embedded
from dwrl_fast.training.runlog import read_metrics
from dwrl_fast.training.trainer import Trainer

GROWTH = 8.0  # MiB that a run may grow in its second half, because allocators keep freed memory


def endless(task: Embedded, folder: Path, steps: int) -> Any:
    """The options of a run of `steps` rollout batches, with a checkpoint every 20."""
    changes = {"rollout_batch_size": 32, "minibatch_size": 16, "max_steps": steps, "num_train_epochs": 1}
    return small(task, folder, **changes, save_steps=20, save_updates=3, learning_rate=1e-4)


def paced(task: Embedded, folder: Path, minutes: float) -> int:
    """The number of rollout batches that each of two simultaneous runs completes in `minutes`, from runs of 20."""
    folder.mkdir(parents=True)
    runs = [endless(task, folder / name, 20) for name in ("one", "other")]
    processes = [life(partial(run, config), folder / "log") for config in runs]
    assert [ended(process) for process in processes] == [0, 0], f"see {folder / 'log'}"
    rows = read_metrics(folder / "one" / "metrics.jsonl")
    return int(60 * minutes / statistics.median(row["seconds"] for row in rows))


def hunted(task: Embedded, folder: Path, minutes: float, between: tuple[float, float], seed: int = 0) -> Drill:
    """Kills after random times in the range `between` (seconds), compared with the same run without kills.

    Both run at the same time. They have as many rollout batches as runs without kills complete in `minutes`.
    """
    steps = paced(task, folder / "pace", minutes)
    chance, kills, started = random.Random(seed), 0, time.monotonic()
    whole = life(lambda: run(endless(task, folder / "whole", steps)), folder / "whole.log")
    while True:
        process = life(lambda: run(endless(task, folder / "killed", steps)), folder / "killed.log")
        until = time.monotonic() + chance.uniform(*between)
        while time.monotonic() < until:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                break
            time.sleep(0.05)
        else:
            os.kill(process, signal.SIGKILL)
            assert ended(process) == -signal.SIGKILL
            kills += 1
            continue
        assert status == 0, f"status {os.waitstatus_to_exitcode(status)}: see {folder / 'killed.log'}"
        break
    took = (time.monotonic() - started) / 60
    assert ended(whole) == 0, f"see {folder / 'whole.log'}"
    same = written(folder / "killed") == written(folder / "whole")
    found_text = f"{'the same' if same else 'OTHER'} weights, thoughts and metrics; "
    found_text += f"{kills} kills in {took:.0f} minutes, {steps} rollout batches"
    return Drill(
        "a long run under kills", "weights equal bit for bit after an hour of kills", found_text, same and kills > 0
    )


def flat(task: Embedded, folder: Path, seconds: float) -> Drill:
    """Resident memory and open descriptors of an undisturbed run, at its middle and at its end."""
    folder.mkdir(parents=True)
    trace = folder / "trace.txt"

    def measured() -> None:
        step, until = Trainer.train_step, time.monotonic() + seconds

        def watched(self: Trainer, *arguments: Any) -> Any:
            values = step(self, *arguments)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with trace.open("a") as file:
                file.write(f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**20:.1f} {len(os.listdir('/proc/self/fd'))}\n")
            if time.monotonic() > until:
                os._exit(0)
            return values

        setattr(Trainer, "train_step", watched)  # noqa: B010 - mypy takes no assignment to a method
        run(endless(task, folder / "run", 1_000_000))

    status = lived(measured, folder / "run.log")
    rows = [tuple(map(float, line.split())) for line in trace.read_text().splitlines()]
    (before, open_before), (after, open_after) = rows[len(rows) // 2], rows[-1]
    found = (
        f"{before:.0f} to {after:.0f} MiB and {open_before:.0f} to {open_after:.0f} descriptors over the second half "
    )
    found += f"of {len(rows)} rollout batches in {seconds / 60:.0f} minutes"
    held = status == 0 and after - before < GROWTH and open_after <= open_before
    return Drill("a long undisturbed run", "memory and descriptors constant in 30 minutes", found, held)
