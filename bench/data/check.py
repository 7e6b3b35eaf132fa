"""How much longer does `python -m dwrl_fast.data --check` take than reading a JSONL file and parsing it?

    python -m bench.data.check --gigabytes 1

Writes generated pairs of realistic lengths into a temporary folder. "parse" reads the file line by line and gives each
line to json.loads, the parser that the check uses too, in one process; "check" is the whole check, its report included.
They take turns, so that a busy machine is busy for both. Prints medians of wall-clock seconds; CPU seconds, of all
processes together, say what the wall clock would be on so many idle cores.
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
    """Pairs until the file has `size` bytes; returns how many. Lengths are log-normal, the mean row has 2.5 kB: more
    than one of HH (1.3 kB), less than one of UltraFeedback (3.4 kB).
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
    """Every line of `path` through `json.loads`, the result of which is dropped."""
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds, those of child processes too."""
    before, started = sum(os.times()[:4]), time.perf_counter()
    run()
    return time.perf_counter() - started, sum(os.times()[:4]) - before


def main() -> None:
    """The command: write pairs, then parse and check them in turn, and print the medians."""
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
