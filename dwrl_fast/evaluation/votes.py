"""What fewer thoughts than were sampled would have given: accuracy at k votes, each k drawn from the same thoughts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwrl_fast.compute import step_seed
from dwrl_fast.evaluation.judged import Judged
from dwrl_fast.evaluation.units import Floats, Units
from dwrl_fast.scoring import Kind

DRAWS = 64  # for each group, of which k thoughts count


@dataclass(frozen=True, slots=True)
class VotePoint:
    """Accuracy of `votes` thoughts a response (or a comparison), with its 95 % interval over rows.

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
    """The points of each way to combine thoughts, at each k of `ks` that is no more than there are thoughts.

    A row counts the mean over its pairs and over 64 ways to draw k of its thoughts without putting back. units: of
    `judged`, by default each a row.
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
    """exp(scores) averaged over the first k of the thoughts, up to a factor: [draws, K, ks]."""
    return (np.exp(drawn - drawn.max()).cumsum(-1) / np.arange(1, drawn.shape[-1] + 1))[..., at]


def _mean_numbers(row: Judged, drawn: Floats, at: NDArray) -> Floats:
    """The mean of those that could be read; a response for which none could is on the wrong side."""
    read = (~np.isnan(drawn)).cumsum(-1)[..., at]
    sums = np.nan_to_num(drawn).cumsum(-1)[..., at]
    wrong = np.where(np.array(row.ranks) == min(row.ranks), -np.inf, np.inf)[:, None]
    return np.where(read > 0, sums / np.maximum(read, 1), wrong)


def _comparisons(row: Judged, drawn: Floats, at: NDArray) -> Floats:
    """The share of its comparisons that each response wins, where one that cannot be read goes to the worse one."""
    ranks = np.array(row.ranks)
    won = np.zeros((len(drawn), len(ranks), len(at)))
    for c, (first, second) in enumerate(row.comparisons):
        read = ~np.isnan(drawn[:, c])
        for place, other, of_read in ((first, second, drawn[:, c]), (second, first, 1 - drawn[:, c])):
            votes = np.where(read, of_read, float(ranks[place] > ranks[other]))
            won[:, place] += votes.cumsum(-1)[..., at] / (at + 1)
    return np.round(won, 12)  # equal shares are equal, in whatever order they were added


def _mean_credit(values: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """values [draws, K, ks] -> [ks]."""
    gaps = np.stack([_compare(values[:, i], values[:, j]) for i, j in pairs])
    return ((gaps + 1) / 2).mean((0, 1))


def _majority(drawn: Floats, at: NDArray, pairs: Sequence[tuple[int, int]]) -> Floats:
    """A vote is one thought about the better response against one about the worse; unread ones are wrong."""
    credits = []
    for i, j in pairs:
        votes = np.where(np.isnan(drawn[:, i]) | np.isnan(drawn[:, j]), -1, _compare(drawn[:, i], drawn[:, j]))
        credits.append((np.sign(votes.cumsum(-1)[..., at]) + 1) / 2)
    return np.stack(credits).mean((0, 1))


def _compare(a: Floats, b: Floats) -> Floats:
    """1 where a is larger, -1 where b is, 0 where they are equal, be they infinite."""
    return (a > b).astype(np.float64) - (a < b)
