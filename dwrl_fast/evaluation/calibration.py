"""How far sigmoid(score difference) can be believed as the probability that the one response is the better.

Every pair has a weight, so that rows of several pairs count as one. A pair says the same whichever response is called
the first: what is compared is the confidence in the response that the model prefers, sigmoid(|gap|), and how often that
is the better one.
"""

from dataclasses import dataclass

import numpy as np

from dwrl_fast.evaluation.pairs import credit
from dwrl_fast.evaluation.units import Floats

BINS = 10  # of confidence, from one half to 1


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of similar confidence: from `low` to below `high`. share: of all pairs."""

    low: float
    high: float
    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """nll: mean -log p of the better response being the better, nats. brier: mean (1 - p)^2. error: the expected
    calibration error, the mean over pairs of |accuracy - confidence| of their bin. bins: those that have pairs.
    """

    nll: float
    brier: float
    error: float
    bins: list[Bin]


def calibration(gap: Floats, weight: Floats, temperature: float = 1.0) -> Calibration:
    """Of p = sigmoid(gap / temperature), gap [P] being scores of the better response less those of the worse, in nats;
    weight [P].
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
    """The T > 0 under which sigmoid(gap / T) is likeliest. Infinite gaps, which no T changes, do not count.

    None if there is no such T: where every pair is right, the likelihood grows as T falls to 0; where the pairs are
    wrong as much as right, as T rises without end.
    """
    finite = np.isfinite(gap)
    gap, weight = gap[finite], weight[finite]
    scale = np.abs(gap).max(initial=0.0)
    if not (gap < 0).any() or (weight * gap).sum() <= 0:
        return None
    gap = gap / scale

    def slope(inverse: float) -> float:  # of the log-likelihood, which is concave in 1 / T
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
    """Without overflow; of infinities 0 and 1."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)
