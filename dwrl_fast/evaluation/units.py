"""How values of pairs are averaged, and the units that the bootstrap draws.

A row of the file counts as the mean over its pairs, whether it was read as one group or as several pairs. Values that
are not independent are drawn together: the pairs of a row, or all rows of one prompt.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dwrl_fast.data import Cluster, Preference

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
RESAMPLES = 100, 100  # in blocks, so that memory is 100 times the units


@dataclass(frozen=True, slots=True)
class Units:
    """The structure of Q values. row: [Q], the row of each value. size: [Q], the number of values of that row,
    including those that `part` left out. unit: [Q], the bootstrap unit of each value, made of whole rows. cluster: the
    kind of unit.
    """

    row: Ints
    size: Ints
    unit: Ints
    cluster: Cluster = "row"

    @classmethod
    def of(cls, rows: Sequence[Preference], cluster: Cluster = "row") -> "Units":
        """Units with one value for each of `rows`, which are pairs and groups as read."""
        row = _numbered([one.row or place for place, one in enumerate(rows)])
        unit = row if cluster == "row" else _numbered([json.dumps(one.prompt) for one in rows])
        return cls(row, np.bincount(row)[row], unit, cluster)

    @classmethod
    def alone(cls, count: int) -> "Units":
        """Units in which each value is a row."""
        return cls(np.arange(count), np.ones(count, dtype=np.int64), np.arange(count))

    def at(self, places: Ints) -> "Units":
        """Units of the values at these indices, which may repeat. A row counts as the mean over its values there."""
        row = self.row[places]
        return Units(row, np.bincount(row, minlength=1)[row], self.unit[places], self.cluster)

    def part(self, chosen: NDArray[np.bool_]) -> "Units":
        """Units of the `chosen` values [Q]. A row with some values left out weighs less."""
        return Units(self.row[chosen], self.size[chosen], self.unit[chosen], self.cluster)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(np.unique(self.row))

    @property
    def prompts(self) -> int | None:
        """The number of prompts, if prompts are drawn; None if rows are drawn."""
        return len(np.unique(self.unit)) if self.cluster == "prompt" else None

    @property
    def weight(self) -> Floats:
        """[Q], one over the number of values of the row."""
        return 1 / self.size

    def sums(self, values: ArrayLike) -> Floats:
        """[U], for each unit the sum over its rows of the mean of a row's values. values: [Q]."""
        of_rows, first = self._of_rows(values)
        _, unit = np.unique(self.unit[first], return_inverse=True)
        return np.bincount(unit, of_rows).astype(np.float64)

    def mean(self, values: ArrayLike) -> float:
        """The mean over rows of the values [Q]; it does not depend on the units."""
        return float(self._of_rows(values)[0].sum() / self._of_rows(np.ones(len(self.row)))[0].sum())

    def interval(self, values: ArrayLike, seed: int) -> tuple[float, float]:
        """`bootstrap_interval` of `mean`; whole units are drawn."""
        weights = self.sums(np.ones(len(self.row)))
        return bootstrap_interval(self.sums(values) / weights, seed, weights)

    def _of_rows(self, values: ArrayLike) -> tuple[Floats, Ints]:
        """For each row, the sum of its values divided by `size`, and the index of its first value."""
        _, first, row = np.unique(self.row, return_index=True, return_inverse=True)
        return np.bincount(row, np.asarray(values, dtype=np.float64)) / self.size[first], first


def bootstrap_interval(values: np.ndarray, seed: int, weights: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of values [P]; with `weights` [P], of their weighted mean."""
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
    """Numbers for the names, by first occurrence: 0 for the first name and all equal to it, 1 for the next."""
    places: dict[Hashable, int] = {}
    return np.array([places.setdefault(name, len(places)) for name in names], dtype=np.int64)
