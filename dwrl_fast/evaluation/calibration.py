"""Calibration: whether sigmoid(score difference) is the probability that a response is the better one.

Every pair has a weight, so that a row with several pairs counts once. The result does not depend on the order of the
two responses: the confidence in the response that the model prefers, sigmoid(|gap|), is compared with how often that
response is the better one.
"""

from dataclasses import dataclass

import numpy as np

from dwrl_fast.evaluation.pairs import credit
from dwrl_fast.evaluation.units import Floats

BINS = 10  # of confidence, from one half to 1


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs with a confidence from `low` to below `high`. share: their share of all pairs."""

    low: float
    high: float
    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """nll: mean -log p of the better response being the better, nats. brier: mean (1 - p)^2. error: the expected
    calibration error, the mean over pairs of |accuracy - confidence| of their bin. bins: the non-empty bins.
    """

    nll: float
    brier: float
    error: float
    bins: list[Bin]


def calibration(gap: Floats, weight: Floats, temperature: float = 1.0) -> Calibration:
    """The calibration of p = sigmoid(gap / temperature). gap: [P], score of the better response minus that of the
    worse, in nats. weight: [P].
    """
    gap, share = gap / temperature, weight / weight.sum()
    confidence, right = sigmoid(np.abs(gap)), credit(gap)
    edges = np.linspace(0.5, 1, BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, BINS - 1)
    bins = []
    for b in np.unique(place):
        some = place == b
        of_bin = share[some].sum()
        mean, accuracy = ((share[some] * values[some]).sum() / of_bin for values in (confidence, right))
        bins.append(Bin(float(edges[b]), float(edges[b + 1]), float(mean), float(accuracy), float(of_bin)))
    return Calibration(
        nll=float((share * np.logaddexp(0, -gap)).sum()),
        brier=float((share * sigmoid(-gap) ** 2).sum()),
        error=sum(b.share * abs(b.accuracy - b.confidence) for b in bins),
        bins=bins,
    )


def fit_temperature(gap: Floats, weight: Floats) -> float | None:
    """The T > 0 that maximises the likelihood of sigmoid(gap / T). Infinite gaps do not depend on T and are left out.

    None if there is no such T: if every pair is right, the likelihood grows as T falls to 0; if the pairs are wrong as
    much as right, it grows as T rises to infinity.
    """
    finite = np.isfinite(gap)
    gap, weight = gap[finite], weight[finite]
    scale = np.abs(gap).max(initial=0.0)
    if not (gap < 0).any() or (weight * gap).sum() <= 0:
        return None
    gap = gap / scale

    def slope(inverse: float) -> float:  # slope of the log-likelihood, which is concave in 1 / T
        return float((weight * gap * sigmoid(-inverse * gap)).sum())

    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(scale / ((low + high) / 2))


def sigmoid(x: Floats) -> Floats:
    """The sigmoid without overflow; 0 and 1 for infinities."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)
