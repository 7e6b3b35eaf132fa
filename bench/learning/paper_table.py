"""Trains every method on the same pairs from the same warmed-up backbone: the papers' table at a small scale.

    python -m bench.learning.paper_table --quick  # one cell (easy fraction 0.7), 3 seeds, stored settings
    python -m bench.learning.paper_table --full   # all cells, rates swept on dev first; resumes if interrupted

Two runs at a time, each in its own process with one thread. Every finished run is a line of results.jsonl in `--folder`
and is not repeated. The table is made from these lines. No order of methods is asserted.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import command
from bench.learning.paper_table_figures import Record, Swept, lines, markdown, sweep
from bench.learning.paper_table_runs import VARIANTS, Cell, Run, backbone, execute
from bench.machine import machine
from dwrl_fast.train import versions

EASY_FRACTIONS = (0.0, 0.4, 0.7)
SEEDS = (0, 1, 2)
SWEEP_SEEDS = (100,)
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)


def cells(seeds: Sequence[int], full: bool) -> list[Cell]:
    """The cells of `--full`, or the one of `--quick`, each with all `seeds`."""
    if not full:
        return [Cell("sums", EASY_FRACTIONS[-1], seed) for seed in seeds]
    sums = [Cell("sums", share, seed) for share in EASY_FRACTIONS for seed in seeds]
    return [*sums, *(Cell("attributes", 0.0, seed) for seed in seeds)]


def swept_runs(variants: Sequence[str]) -> list[Run]:
    """One run on dev for each factor; a judge has no learning rate."""
    return [
        Run(cell, variant, factor, "dev")
        for cell in cells(SWEEP_SEEDS, full=True)
        for variant in variants
        for factor in FACTORS
        if variant != "judge"
    ]


def final_runs(found: Sequence[Cell], variants: Sequence[str], swept: Sequence[Swept]) -> list[Run]:
    """One run on test for each cell and variant, with the factor that was best on dev."""
    best = {(each.task, each.variant): each.best for each in swept}
    return [Run(cell, variant, best.get((cell.name, variant), 1.0)) for cell in found for variant in variants]


class Results:
    """The lines of one file, by run."""

    def __init__(self, path: Path):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
        self.path = path
        self.found: dict[Run, Record] = {run_of(record): record for record in map(json.loads, lines)}

    def add(self, record: Record) -> None:
        """Add `record`, also to the file."""
        self.found[run_of(record)] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def of(self, runs: Iterable[Run]) -> list[Record]:
        """The records of the finished `runs`."""
        return [self.found[run] for run in runs if run in self.found]


def run_of(record: Record) -> Run:
    """The run of `record`."""
    return Run(Cell(**record["cell"]), record["variant"], record["factor"], record["split"])


def carry_out(runs: Sequence[Run], results: Results, root: Path, jobs: int, console: Console) -> None:
    """Execute all `runs` without a result. A failed run is reported and gets no result."""
    left = [run for run in runs if run not in results.found]
    cells = sorted({run.cell for run in left})
    _each("backbone", backbone, [(cell, root) for cell in cells], jobs, console, lambda made: None)
    _each("run", execute, [(run, root) for run in left], jobs, console, results.add)


def _each(
    name: str,
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    jobs: int,
    console: Console,
    done: Callable[[Any], None],
) -> None:
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(function, *each): each[0] for each in arguments}
        for count, future in enumerate(as_completed(pending), 1):
            spent = time.monotonic() - started
            if error := future.exception():
                line = f"{name} FAILED: {pending[future]}: {error!r}"
            else:
                done(future.result())
                left = spent / count * (len(pending) - count)
                line = f"{name} {count}/{len(pending)}  {spent:.0f} s, {left:.0f} s left  {pending[future]}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """The command: sweep, run, and write the table."""
    parser = command.parser("learning.paper_table", __doc__)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/paper_table"), help="where runs and results go [%(default)s]"
    )
    parser.add_argument("--json", type=Path, help="write the table's figures here too")
    given = parser.parse_args()
    console = Console()
    root = given.folder
    root.mkdir(parents=True, exist_ok=True)
    results = Results(root / "results.jsonl")

    tried = swept_runs(given.methods) if given.full else []
    carry_out(tried, results, root, given.jobs, console)
    swept = sweep(results.of(tried))
    final = final_runs(cells(given.seeds, given.full), given.methods, swept)
    carry_out(final, results, root, given.jobs, console)

    table = lines(results.of(final))
    text = markdown(table, swept)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    (root / "paper_table.md").write_text(text, encoding="utf-8")
    path = given.json or root / "paper_table.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine(),
        "versions": versions(),
        "jobs": given.jobs,
        "lines": [asdict(line) for line in table],
        "sweep": [asdict(each) for each in swept],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"{len(results.of(final))} of {len(final)} runs; written: {path}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
