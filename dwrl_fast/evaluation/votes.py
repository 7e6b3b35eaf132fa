"""The accuracy with k votes for smaller k: each k draws from the thoughts that were sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwrl_fast.compute import step_seed
from dwrl_fast.evaluation.judged import Judged
from dwrl_fast.evaluation.units import Floats, Units
from dwrl_fast.scoring import Kind

DRAWS = 64  # random subsets of k thoughts per group


@dataclass(frozen=True, slots=True)
class VotePoint:
    """Accuracy with `votes` thoughts per response (or comparison), with its 95 % interval over rows.

    by: "mean" of p(Yes), or of the numbers; or the "majority" of the verdicts.
    """

    votes: int
    by: str
    accuracy: float
    low: float
    high: float


def vote_curve(
    judged: Sequence[Judged], kind: Kind, ks: Sequence[int], seed: int, units: Units | None = None
) -> list[VotePoint]:
    """The points for each way to combine thoughts, at each k of `ks` up to the number of thoughts.

    A row counts as the mean over its pairs and over 64 draws of k of its thoughts without replacement. units: of
    `judged`; by default each is a row.
    """
    places = [place for place, row in enumerate(judged) if len(set(row.ranks)) > 1]
    units, judged = (units or Units.alone(len(judged))).at(np.array(places)), [judged[place] for place in places]
    ks = [k for k in ks if k <= min(len(some) for row in judged for some in row.verdicts)]
    rng = np.random.default_rng(step_seed(seed, "vote curve", 0))
    found = [_credits(row, kind, ks, rng) for row in judged]
    return [
        VotePoint(k, by, units.mean(values), *units.interval(values, seed))
        for by in found[0]
        for k, values in zip(ks, np.stack([credits[by] for credits in found], axis=1), strict=True)
    ]


def _credits(row: Judged, kind: Kind, ks: Sequence[int], rng: np.random.Generator) -> dict[str, Floats]:
    """The credit of one group at each k, for each way to combine."""
    values = np.array(row.verdicts, dtype=np.float64)  # None becomes nan
    order = rng.random((DRAWS, *values.shape)).argsort(-1)
    drawn = np.take_along_axis(np.broadcast_to(values, order.shape), order, -1)  # [draws, K or C, N]
    at = np.array(ks) - 1
    pairs = [(i, j) for i, a in enumerate(row.ranks) for j, b in enumerate(row.ranks) if a < b]
    if kind == "comparison":
        return {"majority": _mean_credit(_comparisons(row, drawn, at), pairs)}
    mean = _mean_scores(drawn, at) if kind == "score" else _mean_numbers(row, drawn, at)
    return {"mean": _mean_credit(mean, pairs), "majority": _majority(drawn, at, pairs)}


def _mean_scores(drawn: Floats, at: NDArray) -> Floats:
    """exp(scores), averaged over the first k thoughts, up to a factor: [draws, K, ks]."""
    return (np.exp(drawn - drawn.max()).cumsum(-1) / np.arange(1, drawn.shape[-1] + 1))[..., at]


def _mean_numbers(row: Judged, drawn: Floats, at: NDArray) -> Floats:
    """The mean of the readable numbers. A response without any readable number counts as wrong."""
    read = (~np.isnan(drawn)).cumsum(-1)[..., at]
    sums = np.nan_to_num(drawn).cumsum(-1)[..., at]
    wrong = np.where(np.array(row.ranks) == min(row.ranks), -np.inf, np.inf)[:, None]
    return np.where(read > 0, sums / np.maximum(read, 1), wrong)


def _comparisons(row: Judged, drawn: Floats, at: NDArray) -> Floats:
    """The share of its comparisons that each response wins. An unreadable comparison counts for the worse response."""
    ranks = np.array(row.ranks)
    won = np.zeros((len(drawn), len(ranks), len(at)))
    for c, (first, second) in enumerate(row.comparisons):
        read = ~np.isnan(drawn[:, c])
        for place, other, of_read in ((first, second, drawn[:, c]), (second, first, 1 - drawn[:, c])):
            votes = np.where(read, of_read, float(ranks[place] > ranks[other]))
            won[:, place] += votes.cumsum(-1)[..., at] / (at + 1)
    return np.round(won, 12)  # so that the order of summation does not matter


def _mean_credit(values: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """The mean credit: values [draws, K, ks] -> [ks]."""
    gaps = np.stack([_compare(values[:, i], values[:, j]) for i, j in pairs])
    return ((gaps + 1) / 2).mean((0, 1))


def _majority(drawn: Floats, at: NDArray, pairs: Sequence[tuple[int, int]]) -> Floats:
    """The majority credit. A vote is one thought about the better response against one about the worse; unreadable
    votes are wrong.
    """
    credits = []
    for i, j in pairs:
        votes = np.where(np.isnan(drawn[:, i]) | np.isnan(drawn[:, j]), -1, _compare(drawn[:, i], drawn[:, j]))
        credits.append((np.sign(votes.cumsum(-1)[..., at]) + 1) / 2)
    return np.stack(credits).mean((0, 1))


def _compare(a: Floats, b: Floats) -> Floats:
    """1 if a is larger, -1 if b is larger, 0 if they are equal, also if both are infinite."""
    return (a > b).astype(np.float64) - (a < b)
