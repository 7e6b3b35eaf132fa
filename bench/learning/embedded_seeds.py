"""Measures how much DWRL raises held-out accuracy on hard pairs above the warmed-up start: the default run, seed by
seed.

    python -m bench.learning.embedded_seeds --seeds 0 1 2 3

Prints every seed, the mean, and the number of seeds for which one greedy thought gained at least 15 points; writes the
same as JSON. `--against bench/results/cpu_embedded_seeds.json` tells for each mean whether it is within the prediction
interval of the stored seeds, as it should be on a GPU. Options after `--` are passed to dwrl_fast.train: `--
--misalignment_weight off` measures an ablation.
"""

import json
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from bench import command
from bench.learning.intervals import comparison, next_mean
from bench.machine import machine
from dwrl_fast.console import set_up_logging
from dwrl_fast.train import configure, run

WANTED, TITLE = 0.15, "Held-out hard pairs, the embedded task"
COLUMNS = {
    "accuracy_before": "before",
    "accuracy_after": "after",
    "accuracy_before_4_thoughts": "before, 4 thoughts",
    "accuracy_after_4_thoughts": "after, 4 thoughts",
    "accuracy_bt": "bt",
    "seconds": "seconds",
}


def seed_row(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one run, from the result of `dwrl_fast.train`; rise is from 0 to 1."""
    row = {name: result[name] for name in COLUMNS if result.get(name) is not None}
    return {"seed": result["seed"], **row, "rise": row["accuracy_after"] - row["accuracy_before"]}


def table(rows: list[dict[str, float]]) -> Table:
    """A line for each seed, and their mean."""
    columns = {"seed": "seed", **COLUMNS, "rise": "rise"}
    average = {name: mean(row[name] for row in rows) for name in columns if all(name in row for row in rows)}
    shown = Table(*(Column(title, justify="right") for title in columns.values()), title=TITLE)
    for row in rows:
        shown.add_row(*(_cell(name, row.get(name)) for name in columns), end_section=row is rows[-1])
    shown.add_row("mean", *(_cell(name, average.get(name)) for name in columns if name != "seed"))
    return shown


def compared(rows: list[dict[str, float]], stored: list[dict[str, float]]) -> Table:
    """Each mean over `rows`, next to that of the stored seeds."""
    found = []
    for name, title in (COLUMNS | {"rise": "rise"}).items():
        here, there = ([row[name] for row in some if name in row] for some in (rows, stored))
        if name != "seconds" and here and len(there) > 1:
            found.append((title, mean(there), mean(here), next_mean(there, len(here))))
    return comparison("means over seeds", found)


def _cell(name: str, value: float | None) -> str:
    shape = {"seed": ".0f", "seconds": ".0f", "rise": "+.3f"}.get(name, ".3f")
    return "" if value is None else format(value, shape)


def main() -> None:
    """The command: train seed by seed, print the table and write the JSON."""
    parser = command.parser("learning.embedded_seeds", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/embedded_seeds"), help="where the runs and the JSON go"
    )
    parser.add_argument("--json", type=Path, help="where the JSON goes (default FOLDER/embedded_seeds.json)")
    parser.add_argument("--against", type=Path, help="such a JSON, of another machine")
    parser.add_argument("options", nargs="*", help="after --: options of dwrl_fast.train")
    given = parser.parse_args()
    against = json.loads(given.against.read_text())["seeds"] if given.against else []
    console = Console()
    set_up_logging(console)

    rows = []
    for seed in given.seeds:
        options = [*given.options, "--seed", str(seed), "--output_dir", str(given.folder / f"seed-{seed}")]
        rows.append(seed_row(run(configure(options), console)))
    risen = sum(row["rise"] >= WANTED for row in rows)
    console.print(table(rows))
    console.print(f"{risen} of {len(rows)} seeds rose by at least {WANTED:.2f}")
    if given.against:
        console.print(compared(rows, against))
    path = given.json or given.folder / "embedded_seeds.json"
    report = {"machine": machine(), "options": shlex.join(given.options), "risen": risen, "seeds": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
