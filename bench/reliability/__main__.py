"""Tests whether runs survive kills, signals, disk errors and damaged checkpoints. Each drill proves that its fault
occurred.

    python -m bench.reliability --quick          # a sample of every drill, some minutes
    python -m bench.reliability                  # the full number of kills and faults, without the long runs
    python -m bench.reliability --only soak --minutes 60

All drills use a small version of the embedded task, on one thread, in processes forked from this one. The exit status
is 1 if a drill fails.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from bench import command
from bench.machine import machine
from bench.reliability import cost, disks, files, kills, resume, signals, soak
from bench.reliability.drill import Drill
from bench.reliability.task import CASES, made
from dwrl_fast.log import logger

Drills = Callable[[], Iterator[Drill]]


def drills(given: argparse.Namespace, work: Path) -> dict[str, Drills]:
    """The drills by their names for --only. Each works in its own folder under `work`."""
    task, quick = made(given.task or work / "task"), given.quick

    def resumed() -> Iterator[Drill]:
        for case in CASES:
            yield resume.resumed_everywhere(
                task, work / case.replace(", ", "-"), case, **{"max_steps": 3} if quick else {}
            )

    def killed() -> Iterator[Drill]:
        yield kills.single(work / "single", 40 if quick else 200)
        yield kills.together(work / "together", 4 if quick else 50)

    def disk() -> Iterator[Drill]:
        yield disks.refused(task, work / "refused")
        yield disks.vanished(task, work / "vanished")
        yield disks.unread(task, work / "unread")
        yield disks.damaged(task, work / "damaged")

    def long() -> Iterator[Drill]:
        least = max(15.0, given.minutes)  # seconds; a run that is killed sooner does not reach its next checkpoint
        yield soak.hunted(task, work / "hunted", given.minutes, (least, 3 * least))
        yield soak.flat(task, work / "flat", 30 * given.minutes)

    return {
        "resume": resumed,
        "signals": lambda: iter([signals.signalled(task, work / "signals")]),
        "kills": killed,
        "disks": disk,
        "files": lambda: iter([files.hostile(task, work / "files")]),
        "cost": lambda: iter([cost.cost(work / "cost", 20 if quick else 50, 1 if quick else 3)]),
        "soak": long,
    }


def main() -> None:
    """The command: run the drills, print their table and write the JSON."""
    parser = command.parser("reliability", __doc__)
    parser.add_argument("--quick", action="store_true", help="a sample of every drill")
    parser.add_argument("--only", nargs="+", help="resume signals kills disks files cost soak (default: all but soak)")
    parser.add_argument(
        "--minutes", type=float, default=60, help="length of the run under kills; the undisturbed run takes half of it"
    )
    parser.add_argument("--task", type=Path, help="the folder of the embedded task; created if it is missing")
    parser.add_argument("--json", type=Path, help="also write the table here")
    given = parser.parse_args()
    logger.setLevel(logging.ERROR)  # drills leave checkpoints that are skipped with a warning
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise it warns at every fork
    rows: list[tuple[Drill, float]] = []
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        able = drills(given, Path(name))
        for part in given.only or [name for name in able if name != "soak"]:
            started = time.monotonic()
            for drill in able[part]():
                rows.append((drill, time.monotonic() - started))
                print(f"{'held' if drill.held else 'FAILED':<7}{drill.name}: {drill.found}", flush=True)
                started = time.monotonic()
    cells = [(d.name, d.asked, d.found, "yes" if d.held else "NO", f"{seconds:.0f}") for d, seconds in rows]
    Console().print(command.table("Reliability", ("drill", "asked", "found", "held", "s"), cells, left=4))
    if given.json:
        report = {"machine": machine(), "drills": [drill._asdict() | {"seconds": round(s)} for drill, s in rows]}
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(not all(drill.held for drill, _ in rows))


if __name__ == "__main__":
    main()
