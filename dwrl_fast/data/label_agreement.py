"""How far several labels of the same comparisons agree: Fleiss' kappa, Krippendorff's alpha, Pearson's r.

Each is a well-kept library's, loaded when first asked for.
"""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwrl_fast.errors import ConfigError


@dataclass(frozen=True)
class Agreement:
    """1: always the same label; 0: as often as by chance; below, less often; NaN where there was nothing to differ in.

    comparisons: how many have at least two labels, and labels: how many those have. fleiss_kappa needs equally many
    everywhere, so it is of the `fleiss_comparisons` that have `fleiss_labels`, the most common number.
    krippendorff_alpha (nominal) is of all. pearson_r is between the strengths of the first two labels of each.
    """

    comparisons: int
    labels: int
    fleiss_kappa: float
    fleiss_comparisons: int
    fleiss_labels: int
    krippendorff_alpha: float
    pearson_r: float


def agreement(comparisons: np.ndarray, strengths: np.ndarray) -> Agreement | None:
    """Of labels [L]: the comparison that each is of, any number, and its strength, positive where the first response is
    better, negative where the second is, 0 where they tie. None where no comparison has two labels.

    Which response is called the first means nothing, so each comparison counts in both orders: no result depends on it.
    """
    _, items, counts = np.unique(comparisons, return_inverse=True, return_counts=True)
    order = np.argsort(items, kind="stable")
    order = order[counts[items[order]] > 1]
    if not len(order):
        return None
    labels = strengths[order].astype(np.float64)
    _, starts, items, counts = np.unique(items[order], return_index=True, return_inverse=True, return_counts=True)
    table = np.zeros((len(counts), 3))  # how often the second won, they tied, the first won
    np.add.at(table, (items, np.sign(labels).astype(int) + 1), 1)
    usual = int(np.bincount(counts).argmax())
    table = np.concatenate([table, table[:, ::-1]])
    same = np.tile(counts == usual, 2)
    first, second = labels[starts], labels[starts + 1]
    return Agreement(
        comparisons=len(counts),
        labels=len(labels),
        fleiss_kappa=fleiss_kappa(table[same]),
        fleiss_comparisons=int((counts == usual).sum()),
        fleiss_labels=usual,
        krippendorff_alpha=krippendorff_alpha(table),
        pearson_r=pearson_r(np.r_[first, -first], np.r_[second, -second]),
    )


def fleiss_kappa(table: np.ndarray) -> float:
    """Of a table [items, categories] of how often each was chosen, equally many choices for every item."""
    if (table > 0).any(axis=0).sum() < 2:
        return math.nan
    return float(_library("statsmodels.stats.inter_rater").fleiss_kappa(table))


def krippendorff_alpha(table: np.ndarray) -> float:
    """Nominal, of the same kind of table, with any number of choices for an item."""
    if (table > 0).any(axis=0).sum() < 2:
        return math.nan
    return float(_library("krippendorff").alpha(value_counts=table, level_of_measurement="nominal"))


def pearson_r(x: np.ndarray, y: np.ndarray) -> float:
    """Of pairs (x, y)."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(_library("scipy.stats").pearsonr(x, y).statistic)


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            "the rows have several labels for one comparison, and measuring their agreement needs scipy, statsmodels "
            "and krippendorff; run `pip install scipy statsmodels krippendorff`"
        ) from error
