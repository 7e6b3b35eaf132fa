"""Compares the time of `python -m dwrl_fast.data --check` with that of reading and parsing a JSONL file.

    python -m bench.data.check --gigabytes 1

It writes random pairs of realistic lengths into a temporary folder. `parse` passes each line of the file to json.loads,
in one process; the check uses the same parser. `check` is the whole check with its report. The two alternate, so that
other load on the machine affects both. It prints medians of wall-clock seconds and of CPU seconds. CPU seconds are the
sum over all processes; divided by the number of cores, they estimate the wall-clock time on an idle machine.
"""

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench import command
from dwrl_fast.data.check import check

WORDS = 20_000
TYPOGRAPHY = (" “quoted” ", " — ", "’s ", " é ", " 中文 ")


def write_pairs(path: Path, size: int, seed: int = 0) -> int:
    """Write pairs until the file has `size` bytes, and return their number. Lengths are log-normal. A mean row has
    2.5 kB, which is between those of HH (1.3 kB) and UltraFeedback (3.4 kB).
    """
    draw = random.Random(seed)
    words = ["".join(draw.choices("eeeeetttaaooinnsshrrdlucm", k=draw.randint(1, 9))) for _ in range(WORDS)]

    def text(median: int) -> str:
        said = " ".join(draw.choices(words, k=max(1, int(draw.lognormvariate(0, 0.8) * median))))
        return said + draw.choice(TYPOGRAPHY) + "\n\nSo." if draw.random() < 0.3 else said

    rows, written = 0, 0
    with open(path, "wb") as file:
        while written < size:
            turns = [("user", text(40))]
            if draw.random() < 0.3:
                turns += [("assistant", text(60)), ("user", text(15))]
            row = {
                "prompt": [{"role": role, "content": said} for role, said in turns],
                "chosen": [{"role": "assistant", "content": text(110)}],
                "rejected": [{"role": "assistant", "content": text(110)}],
                "id": rows,
            }
            written += file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            rows += 1
    return rows


def parse(path: Path) -> None:
    """Pass every line of `path` to `json.loads`, and drop the results."""
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds, including those of child processes."""
    before, started = sum(os.times()[:4]), time.perf_counter()
    run()
    return time.perf_counter() - started, sum(os.times()[:4]) - before


def main() -> None:
    """The command: write pairs, parse and check them alternately, and print the medians."""
    parser = command.parser("data.check", __doc__)
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=None, help="of the check; by default the cores there are")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        rows = write_pairs(path, int(options.gigabytes * 1e9))
        size = path.stat().st_size
        runs = {"parse": lambda: parse(path), "check": lambda: check(path, processes=options.processes)}
        taken = [[seconds(run) for run in runs.values()] for _ in range(options.repeats)]
    found = [[statistics.median(part) for part in zip(*times, strict=True)] for times in zip(*taken, strict=True)]
    lines = []
    for name, (wall, cpu) in zip(runs, found, strict=True):
        ratios = (f"{one / other:.2f}" for one, other in zip((wall, cpu), found[0], strict=True))
        lines.append((name, f"{wall:.2f}", f"{cpu:.2f}", f"{size / wall / 1e6:.0f}", *ratios))
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    table = command.table(
        f"{size / 1e9:.2f} GB, {rows:,} pairs, {cores} cores, load {load:.1f}",
        ("", "seconds", "CPU seconds", "MB a second", "ratio", "ratio of CPU"),
        lines,
    )
    Console().print(table)


if __name__ == "__main__":
    main()
