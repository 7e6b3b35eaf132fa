"""The statistics of paper_table.py: from one record per run to one line per variant, with paired intervals."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from bench.learning.paper_table_runs import BASELINE, VARIANTS, Cell
from dwrl_fast.evaluation.units import bootstrap_interval

Record = dict[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One variant on one task, over seeds. Accuracies are from 0 to 1, on held-out pairs.

    interval: of `accuracy`; `difference_interval`: of `difference`, the accuracy minus that of dwrl on the same pairs.
    Both are 95 % bootstrap intervals over the test pairs of all seeds. They hold for these backbones; `seeds` shows the
    variation between seeds. learnt: the number of seeds whose interval after training is above the one before. tokens:
    sampled tokens of thoughts and tokens in updates, means over seeds. Tokens and seconds exclude warm-up and
    evaluation.
    """

    task: str
    variant: str
    seeds: dict[int, float]
    before: float
    accuracy: float
    interval: Interval
    difference: float | None
    difference_interval: Interval | None
    learnt: int
    train_accuracy: float | None
    unparsable: float
    first_share: float | None
    seconds: float
    sampled_tokens: float
    trained_tokens: float
    factor: float


def lines(records: Sequence[Record]) -> list[Line]:
    """A line for each task and variant of the test split, in the order of VARIANTS."""
    tasks: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record["cell"]["seed"]):
        if record["split"] == "test":
            tasks[Cell(**record["cell"]).name][record["variant"]].append(record)
    return [
        _line(task, variant, found[variant], found.get(BASELINE, []))
        for task, found in sorted(tasks.items())
        for variant in VARIANTS
        if variant in found
    ]


def _line(task: str, variant: str, records: Sequence[Record], baseline: Sequence[Record]) -> Line:
    credits = {record["cell"]["seed"]: np.array(record["credits"]) for record in records}
    others = {record["cell"]["seed"]: np.array(record["credits"]) for record in baseline}
    paired = [credits[seed] - others[seed] for seed in credits if seed in others] if variant != BASELINE else []
    own = np.concatenate(list(credits.values()))
    gap = np.concatenate(paired) if paired else None
    after = [record["after"] for record in records]
    verdicts = sum(2 * len(record["credits"]) for record in records)  # one per order, or per response
    return Line(
        task=task,
        variant=variant,
        seeds={seed: float(each.mean()) for seed, each in credits.items()},
        before=mean(record["before"]["accuracy"] for record in records),
        accuracy=float(own.mean()),
        interval=bootstrap_interval(own, 0),
        difference=None if gap is None else float(gap.mean()),
        difference_interval=None if gap is None else bootstrap_interval(gap, 0),
        learnt=sum(record["after"]["low"] > record["before"]["high"] for record in records),
        train_accuracy=_mean(record["train_accuracy"] for record in records),
        unparsable=sum(report["unparsable"] for report in after) / verdicts,
        first_share=_mean(report["first_share"] for report in after),
        seconds=mean(record["seconds"] for record in records),
        sampled_tokens=mean(record["sampled_tokens"] for record in records),
        trained_tokens=mean(record["trained_tokens"] for record in records),
        factor=records[0]["factor"],
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


@dataclass(frozen=True)
class Swept:
    """Mean dev accuracy of a variant on a task, by the factor on its stored learning rates."""

    task: str
    variant: str
    accuracy: dict[float, float]

    @property
    def best(self) -> float:
        """The best factor; of equally good ones the nearest to the stored rates."""
        return max(self.accuracy, key=lambda factor: (self.accuracy[factor], -abs(np.log(factor))))


def sweep(records: Sequence[Record]) -> list[Swept]:
    """A `Swept` for each task and variant, from the runs on dev."""
    found: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["split"] == "dev":
            key = Cell(**record["cell"]).name, record["variant"]
            found[key][record["factor"]].append(float(np.mean(record["credits"])))
    return [
        Swept(task, variant, {factor: mean(each) for factor, each in sorted(by_factor.items())})
        for (task, variant), by_factor in sorted(found.items())
    ]


def overview(found: Sequence[Line]) -> str:
    """A table of variants by tasks: mean, minimum and maximum over seeds."""
    tasks = list(dict.fromkeys(line.task for line in found))
    cells = {(line.variant, line.task): line for line in found}
    return _table(
        ("method", *tasks),
        [
            (variant, *(_spread(cells.get((variant, task))) for task in tasks))
            for variant in VARIANTS
            if any(variant == line.variant for line in found)
        ],
    )


def _spread(line: Line | None) -> str:
    seeds = line.seeds.values() if line else ()
    return f"{line.accuracy:.3f} ({min(seeds):.3f} to {max(seeds):.3f})" if line else ""


def markdown(found: Sequence[Line], swept: Sequence[Swept] = ()) -> str:
    """The overview of all tasks, a table per task, and the sweep if there was one."""
    parts = [overview(found)]
    for task in dict.fromkeys(line.task for line in found):
        parts.append(f"**{task}**\n\n" + _table(COLUMNS, [_row(line) for line in found if line.task == task]))
    if swept:
        factors = sorted({factor for each in swept for factor in each.accuracy})
        rows = [(each.task, each.variant, *(_swept(each, factor) for factor in factors)) for each in swept]
        table = _table(("task", "method", *(f"x {factor:.3g}" for factor in factors)), rows)
        parts.append("**Learning rates, times the stored ones: dev accuracy**\n\n" + table)
    return "\n\n".join(parts) + "\n"


COLUMNS = (
    *("method", "before", "accuracy", "95 %", "against dwrl", "95 %", "seeds", "rose", "in training", "unparsable"),
    *("seconds", "sampled", "trained"),
)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in (titles, *rows))
    return "\n".join([head, "|" + "---|" * len(titles), *lines])


def _row(line: Line) -> tuple[str, ...]:
    return (
        line.variant,
        f"{line.before:.3f}",
        f"{line.accuracy:.3f}",
        "{:.3f} to {:.3f}".format(*line.interval),
        "" if line.difference is None else f"{line.difference:+.3f}",
        "" if line.difference_interval is None else "{:+.3f} to {:+.3f}".format(*line.difference_interval),
        " ".join(f"{accuracy:.3f}" for accuracy in line.seeds.values()),
        f"{line.learnt} of {len(line.seeds)}",
        "" if line.train_accuracy is None else f"{line.train_accuracy:.3f}",
        f"{line.unparsable:.3f}" if line.unparsable else "",
        f"{line.seconds:.0f}",
        f"{line.sampled_tokens / 1e3:,.0f}k" if line.sampled_tokens else "",
        f"{line.trained_tokens / 1e3:,.0f}k" if line.trained_tokens else "",
    )


def _swept(each: Swept, factor: float) -> str:
    shown = f"{each.accuracy[factor]:.3f}" if factor in each.accuracy else ""
    return f"**{shown}**" if factor == each.best else shown
