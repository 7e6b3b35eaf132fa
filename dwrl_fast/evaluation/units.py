"""How values of pairs are averaged, and what is drawn for the interval of their mean.

A row of the file counts the mean over its pairs, whether it was read as one group or as several pairs. What is not
independent is drawn together: the pairs of a row, or all rows of one prompt.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dwrl_fast.data import Cluster, Preference

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
RESAMPLES = 100, 100  # drawn in blocks, so that memory stays at 100 times the units


@dataclass(frozen=True, slots=True)
class Units:
    """Of Q values. row: [Q], the row that each is of; size: [Q], how many values that row has, those that `part` left
    out included. unit: [Q], what is drawn, whole rows; cluster: what a unit is.
    """

    row: Ints
    size: Ints
    unit: Ints
    cluster: Cluster = "row"

    @classmethod
    def of(cls, rows: Sequence[Preference], cluster: Cluster = "row") -> "Units":
        """One value for each of `rows`, which are pairs and groups as they were read."""
        row = _numbered([one.row or place for place, one in enumerate(rows)])
        unit = row if cluster == "row" else _numbered([json.dumps(one.prompt) for one in rows])
        return cls(row, np.bincount(row)[row], unit, cluster)

    @classmethod
    def alone(cls, count: int) -> "Units":
        """Values each of which is a row."""
        return cls(np.arange(count), np.ones(count, dtype=np.int64), np.arange(count))

    def at(self, places: Ints) -> "Units":
        """Of values at these places, which may repeat: a row counts the mean over those that it has there."""
        row = self.row[places]
        return Units(row, np.bincount(row, minlength=1)[row], self.unit[places], self.cluster)

    def part(self, chosen: NDArray[np.bool_]) -> "Units":
        """Of the values that are `chosen` [Q]: a row of which some are left out weighs less."""
        return Units(self.row[chosen], self.size[chosen], self.unit[chosen], self.cluster)

    @property
    def rows(self) -> int:
        """How many rows the values are of."""
        return len(np.unique(self.row))

    @property
    def prompts(self) -> int | None:
        """How many are drawn for an interval; None if rows are drawn."""
        return len(np.unique(self.unit)) if self.cluster == "prompt" else None

    @property
    def weight(self) -> Floats:
        """[Q], one over the values of its row."""
        return 1 / self.size

    def sums(self, values: ArrayLike) -> Floats:
        """[U], of each unit: the sum over its rows of the mean of each row's values [Q]."""
        of_rows, first = self._of_rows(values)
        _, unit = np.unique(self.unit[first], return_inverse=True)
        return np.bincount(unit, of_rows).astype(np.float64)

    def mean(self, values: ArrayLike) -> float:
        """Over rows, of values [Q], whatever is drawn."""
        return float(self._of_rows(values)[0].sum() / self._of_rows(np.ones(len(self.row)))[0].sum())

    def interval(self, values: ArrayLike, seed: int) -> tuple[float, float]:
        """`bootstrap_interval` of `mean`, whole units being drawn."""
        weights = self.sums(np.ones(len(self.row)))
        return bootstrap_interval(self.sums(values) / weights, seed, weights)

    def _of_rows(self, values: ArrayLike) -> tuple[Floats, Ints]:
        """Of each row its sum over `size`, and the place of its first value."""
        _, first, row = np.unique(self.row, return_index=True, return_inverse=True)
        return np.bincount(row, np.asarray(values, dtype=np.float64)) / self.size[first], first


def bootstrap_interval(values: np.ndarray, seed: int, weights: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values [P], drawn with replacement; with `weights` [P] of their
    weighted mean.
    """
    rng = np.random.default_rng(seed)
    blocks, size = RESAMPLES
    weights = np.ones(len(values)) if weights is None else weights
    means = []
    for _ in range(blocks):
        drawn = rng.integers(0, len(values), (size, len(values)))
        means.append((values * weights)[drawn].sum(-1) / weights[drawn].sum(-1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _numbered(names: Sequence[Hashable]) -> Ints:
    """0 for the first name and all that are equal to it, 1 for the next."""
    places: dict[Hashable, int] = {}
    return np.array([places.setdefault(name, len(places)) for name in names], dtype=np.int64)
