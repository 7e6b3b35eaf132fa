"""Pair accuracy: how often the preferred response scores higher, with a bootstrap interval."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dwrl_fast.data import Preference
from dwrl_fast.data.jsonl import finite
from dwrl_fast.errors import DataError
from dwrl_fast.evaluation.units import Floats, Ints, Units
from dwrl_fast.objectives.agreement import ordered_pairs, rank_grid


@dataclass(frozen=True, slots=True)
class PairReport:
    """The figures over `groups` rows with `pairs` ordered pairs (pairs of unequal rank). A row counts as the mean over
    its pairs.

    accuracy: from 0 to 1; equal scores count one half. low, high: its 95 % bootstrap interval. The bootstrap draws
    rows, because pairs of one row are not independent, or prompts if `prompts` is not None. clipped: at least one half,
    as the papers print it. ties: pairs with equal scores. nll: mean -log sigmoid(s+ - s-), nats. tied: further rows,
    left out because all their responses tie. margin: mean s+ - s-, nan if a score is infinite. unparsable: verdicts in
    text that could not be read; they count as wrong. first_share: for methods that show two responses together, the
    share of verdicts for the one shown first; one half without bias. token_accuracy: for policies, the accuracy of mean
    log-probs per token instead of their sums. calibration_error: the expected calibration error in the reports of a
    training run (the report of an evaluation has a whole `Calibration`).
    """

    accuracy: float
    low: float
    high: float
    clipped: float
    ties: int
    groups: int
    nll: float
    tied: int = 0
    unparsable: int = 0
    first_share: float | None = None
    margin: float = math.nan
    token_accuracy: float | None = None
    pairs: int = 0
    prompts: int | None = None
    calibration_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; inf and nan become null."""
        return finite(asdict(self))

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """The inverse of `to_dict`, except that figures that were not finite become their defaults."""
        return cls(**{"nll": math.inf} | {name: value for name, value in saved.items() if value is not None})

    def __str__(self) -> str:
        parts = (
            f"{self.accuracy:.3f}",
            f" (clipped {self.clipped:.3f})" if self.clipped != self.accuracy else "",
            f" [{self.low:.3f}, {self.high:.3f}] on {counted(self.groups, self.prompts, self.pairs)}",
            f", {self.ties} ties" if self.ties else "",
            f", {self.tied} left out whose responses all tie" if self.tied else "",
            f", {self.unparsable} verdicts unparsable" if self.unparsable else "",
            "" if self.first_share is None else f", first shown chosen {self.first_share:.3f}",
            f", nll {self.nll:.3f}",
            f", margin {self.margin:.3f}" if math.isfinite(self.margin) else "",
            "" if self.token_accuracy is None else f", accuracy of log-probs a token {self.token_accuracy:.3f}",
        )
        return "".join(parts)


def counted(rows: int, prompts: int | None, pairs: int) -> str:
    """The size of the data of a report, in words."""
    of_prompts = f" of {prompts} prompts" if prompts is not None else ""
    return f"{rows} rows{of_prompts}" + (f", {pairs} pairs" if pairs > rows else "")


def check_ordered(rows: Sequence[Preference]) -> None:
    """Raise DataError if no row says which response is better. Called before the rows are scored."""
    if rows and all(len(set(row.ranks)) == 1 for row in rows):
        raise DataError(
            f"there is no pair to evaluate: in all of the {Units.of(rows).rows:,} rows, from {rows[0].source} on, the "
            "responses tie. Give rows of which one response is the better"
        )


class Gaps(NamedTuple):
    """Q ordered pairs. group: [Q], the group of each. better, worse: [Q], indices of its responses. gap: [Q], score of
    the better minus that of the worse, nats; 0 if they are equal, also if both are infinite.
    """

    group: Ints
    better: Ints
    worse: Ints
    gap: Floats


def score_gaps(scores: Tensor, ranks: Sequence[Sequence[int]]) -> Gaps:
    """All ordered pairs. scores: [P, K] in nats, nan if a group has fewer responses. ranks: for each of the P groups
    the ranks of its responses; 1 is best, equal ranks tie.
    """
    group, better, worse = ordered_pairs(rank_grid(ranks)).numpy().nonzero()
    values = scores.double().numpy()
    high, low = values[group, better], values[group, worse]
    return Gaps(group, better, worse, np.where(high == low, 0.0, high - np.where(high == low, 0.0, low)))


def credit(gap: NDArray) -> Floats:
    """1 if the better response has the higher score, one half if the scores are equal, otherwise 0."""
    return (gap > 0) + 0.5 * (gap == 0)


def pair_report(
    scores: Tensor, ranks: Sequence[Sequence[int]], seed: int = 0, units: Units | None = None
) -> PairReport:
    """scores, ranks: as in `score_gaps`. units: of the P groups; by default each group is a row."""
    if scores.shape[0] == 0:
        raise DataError("there is no pair to evaluate: the file is empty, or every row was dropped")
    found = score_gaps(scores, ranks)
    if not len(found.gap):
        raise DataError("there is no pair to evaluate: the responses of every row tie")
    if np.isnan(found.gap).any():
        raise DataError("a row has a score that is not a number: the model gives NaN")
    every = units or Units.alone(len(scores))
    units = every.at(found.group)
    right = credit(found.gap)
    low, high = units.interval(right, seed)
    accuracy = units.mean(right)
    return PairReport(
        accuracy=accuracy,
        low=low,
        high=high,
        clipped=max(accuracy, 0.5),
        ties=int((found.gap == 0).sum()),
        groups=units.rows,
        nll=units.mean(np.logaddexp(0, -found.gap)),
        tied=every.rows - units.rows,
        margin=units.mean(found.gap) if np.isfinite(found.gap).all() else math.nan,
        pairs=len(found.gap),
        prompts=units.prompts,
    )


def full_report(
    scores: Tensor,
    ranks: Sequence[Sequence[int]],
    seed: int,
    units: Units,
    *,
    unparsable: int,
    first_shares: Sequence[float],
    token_scores: Tensor | None,
) -> PairReport:
    """`pair_report` with the figures of verdicts. token_scores: [P, K], in the form of `scores`."""
    return replace(
        pair_report(scores, ranks, seed, units),
        unparsable=unparsable,
        first_share=sum(first_shares) / len(first_shares) if first_shares else None,
        token_accuracy=None if token_scores is None else pair_report(token_scores, ranks, seed, units).accuracy,
    )
