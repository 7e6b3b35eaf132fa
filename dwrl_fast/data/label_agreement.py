"""The agreement between several labels of the same comparisons: Fleiss' kappa, Krippendorff's alpha, Pearson's r.

Each figure comes from an established library, which is loaded when it is first used.
"""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwrl_fast.errors import ConfigError


@dataclass(frozen=True)
class Agreement:
    """1: labels always agree; 0: as often as by chance; below 0: less often; NaN: all labels are equal or there are too
    few.

    comparisons: the number of comparisons with at least two labels; labels: the number of their labels. fleiss_kappa
    needs the same number of labels everywhere, so it uses only the `fleiss_comparisons` with `fleiss_labels` labels,
    the most common number. krippendorff_alpha (nominal) uses all. pearson_r correlates the strengths of the first two
    labels of each comparison.
    """

    comparisons: int
    labels: int
    fleiss_kappa: float
    fleiss_comparisons: int
    fleiss_labels: int
    krippendorff_alpha: float
    pearson_r: float


def agreement(comparisons: np.ndarray, strengths: np.ndarray) -> Agreement | None:
    """The agreement of labels [L]. comparisons: the comparison of each label, as any number. strengths: positive if the
    first response is better, negative if the second is, 0 if they tie. None if no comparison has two labels.

    Each comparison counts in both orders, so the result does not depend on which response is called the first.
    """
    _, items, counts = np.unique(comparisons, return_inverse=True, return_counts=True)
    order = np.argsort(items, kind="stable")
    order = order[counts[items[order]] > 1]
    if not len(order):
        return None
    labels = strengths[order].astype(np.float64)
    _, starts, items, counts = np.unique(items[order], return_index=True, return_inverse=True, return_counts=True)
    table = np.zeros((len(counts), 3))  # counts: the second won, a tie, the first won
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
    """table: [items, categories], how often each category was chosen, with the same number of choices for every
    item.
    """
    if (table > 0).any(axis=0).sum() < 2:
        return math.nan
    return float(_library("statsmodels.stats.inter_rater").fleiss_kappa(table))


def krippendorff_alpha(table: np.ndarray) -> float:
    """The nominal alpha; the same kind of table, with any number of choices per item."""
    if (table > 0).any(axis=0).sum() < 2:
        return math.nan
    return float(_library("krippendorff").alpha(value_counts=table, level_of_measurement="nominal"))


def pearson_r(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of pairs (x, y)."""
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
