"""Prediction intervals for further runs, from stored runs: 95 % intervals that include the chance variation of the new
run.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from rich.table import Table
from scipy import stats

from bench import command

LEVEL = 0.95
INSIDE = {True: "within", False: "[bold red]OUTSIDE[/]"}
Interval = tuple[float, float]


def next_mean(values: Sequence[float], count: int) -> Interval:
    """The interval of the mean of `count` further values like `values` (at least two): Student's t."""
    spread = stdev(values) * sqrt(1 / len(values) + 1 / count)
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * spread
    return mean(values) - reach, mean(values) + reach


def next_share(share: float, pairs: int) -> Interval:
    """The interval of the share of `pairs` that a further run gets right, if one run got `share`: beta-binomial,
    Jeffreys' prior.
    """
    right = share * pairs
    counts = stats.betabinom(pairs, right + 0.5, pairs - right + 0.5).ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(counts[0]) / pairs, float(counts[1]) / pairs


def comparison(title: str, rows: Sequence[tuple[str, float, float, Interval]]) -> Table:
    """rows: the name of a figure, its stored value, its new value, and the interval."""
    lines = [
        (name, f"{stored:.3f}", f"{found:.3f}", f"{low:.3f} to {high:.3f}", INSIDE[low <= found <= high])
        for name, stored, found, (low, high) in rows
    ]
    return command.table(title, ("", "stored", "here", "95 % interval of a run here", ""), lines)
