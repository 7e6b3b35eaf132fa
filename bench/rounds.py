"""Runs all variants in every round, so that compared times come from the same round. Ratios are computed per round."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Ratio(NamedTuple):
    """The time of one variant divided by that of another: median, minimum and maximum over the rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def in_turn(ways: Mapping[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """The seconds of each variant, one figure per round. The order differs in each round. No round begins after
    `seconds`.
    """
    order, start = random.Random(0), time.perf_counter()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(rounds):
        if done and time.perf_counter() - start > seconds:
            break
        for name in order.sample(list(ways), len(ways)):
            found[name].append(ways[name]())
    return found


def ratio(slow: list[float], fast: list[float]) -> Ratio:
    """The ratio of seconds from the same rounds."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))
