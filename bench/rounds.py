"""Whole runs in turn, round by round: what is compared was taken side by side, so a ratio is one of each round."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Ratio(NamedTuple):
    """How many times as long one way takes as another: over the rounds the median, the least and the most."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def in_turn(ways: Mapping[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """The seconds that each way says it took, a figure a round, in another order each round. No further round begins
    after `seconds`.
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
    """Of the seconds of the same rounds."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))
