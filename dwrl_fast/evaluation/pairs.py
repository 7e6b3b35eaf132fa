"""Pair accuracy: how often the preferred response scores higher, with a bootstrap interval."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwrl_fast.data import Preference
from dwrl_fast.errors import DataError
from dwrl_fast.objectives.agreement import order_accuracy, ordered_pairs, rank_grid

RESAMPLES = 100, 100  # drawn in blocks, so that memory stays at 100 times the rows


@dataclass(frozen=True, slots=True)
class PairReport:
    """Over `groups` preference groups. A group counts the mean over its ordered pairs, those of unequal rank.

    accuracy: a fraction of 1, equal scores one half; low, high: its 95 % bootstrap interval over groups, for pairs of
    one group are not independent. clipped: not under one half, as the papers print it. ties: pairs of equal scores.
    nll: mean -log sigmoid(s+ - s-), nats. tied: further groups, left out because all of their responses tie.
    margin: mean s+ - s-, nan where a score is infinite.
    unparsable: verdicts in text that could not be read, and so are wrong. first_share: of methods that show two
    responses together, the share of verdicts for the one shown first; without bias it is one half. token_accuracy: of
    policies, the accuracy of log-probs a token in place of their sums.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which has no inf and no nan: null stands for them."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        known: dict[str, Any] = {"nll": math.inf}
        known.update({name: value for name, value in saved.items() if value is not None})
        return cls(**known)

    def __str__(self) -> str:
        clipped = f" (clipped {self.clipped:.3f})" if self.clipped != self.accuracy else ""
        ties = f", {self.ties} ties" if self.ties else ""
        tied = f", {self.tied} left out whose responses all tie" if self.tied else ""
        unread = f", {self.unparsable} verdicts unparsable" if self.unparsable else ""
        first = "" if self.first_share is None else f", first shown chosen {self.first_share:.3f}"
        margin = f", margin {self.margin:.3f}" if math.isfinite(self.margin) else ""
        a_token = "" if self.token_accuracy is None else f", accuracy of log-probs a token {self.token_accuracy:.3f}"
        interval = f"[{self.low:.3f}, {self.high:.3f}]"
        seen = f"on {self.groups} groups{ties}{tied}{unread}{first}"
        return f"{self.accuracy:.3f}{clipped} {interval} {seen}, nll {self.nll:.3f}{margin}{a_token}"


def check_ordered(rows: Sequence[Preference]) -> None:
    """DataError where no row says which response is better: before they are scored, not after."""
    if rows and all(len(set(row.ranks)) == 1 for row in rows):
        raise DataError(
            f"there is no pair to evaluate: in all of the {len(rows):,} rows, from {rows[0].source} on, the responses "
            "tie. Give rows of which one response is the better"
        )


def pair_report(scores: Tensor, ranks: Sequence[Sequence[int]], seed: int = 0) -> PairReport:
    """scores [P, K] in nats, nan where a group has fewer responses; ranks: P times those of the group's responses,
    where 1 is the best and equal ones tie.
    """
    if scores.shape[0] == 0:
        raise DataError("there is no pair to evaluate: the file is empty, or every row was dropped")
    grid = rank_grid(ranks)
    ordered = ordered_pairs(grid)
    some = ordered.any((1, 2))
    if not some.any():
        raise DataError("there is no pair to evaluate: the responses of every row tie")
    scores = scores.double()
    one, other = scores[:, :, None], scores[:, None, :]
    gap = torch.where(one == other, 0.0, one - other)  # equal ones may be infinite
    if gap[ordered].isnan().any():
        raise DataError("a row has a score that is not a number: the model gives NaN")
    credit = order_accuracy(scores, grid)
    pairs = ordered.sum((1, 2))[some]
    nll = torch.where(ordered, -F.logsigmoid(gap), 0.0).sum((1, 2))[some] / pairs
    lead = torch.where(ordered, gap, 0.0).sum((1, 2))[some] / pairs
    low, high = bootstrap_interval(credit.numpy(), seed)
    accuracy = credit.mean().item()
    return PairReport(
        accuracy=accuracy,
        low=low,
        high=high,
        clipped=max(accuracy, 0.5),
        ties=int((gap[ordered] == 0).sum()),
        groups=len(credit),
        nll=nll.mean().item(),
        tied=len(scores) - len(credit),
        margin=lead.mean().item() if lead.isfinite().all() else math.nan,
    )


def full_report(
    scores: Tensor,
    ranks: Sequence[Sequence[int]],
    seed: int,
    *,
    unparsable: int,
    first_shares: Sequence[float],
    token_scores: Tensor | None,
) -> PairReport:
    """`pair_report` with what else is known of the verdicts; token_scores [P, K] as scores are."""
    return replace(
        pair_report(scores, ranks, seed),
        unparsable=unparsable,
        first_share=sum(first_shares) / len(first_shares) if first_shares else None,
        token_accuracy=None if token_scores is None else pair_report(token_scores, ranks, seed).accuracy,
    )


def bootstrap_interval(values: np.ndarray, seed: int, weights: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values [P], over rows drawn with replacement; with `weights` [P] of
    their weighted mean.
    """
    rng = np.random.default_rng(seed)
    blocks, size = RESAMPLES
    means = []
    for _ in range(blocks):
        drawn = rng.integers(0, len(values), (size, len(values)))
        if weights is None:
            means.append(values[drawn].mean(-1))
        else:
            means.append((values * weights)[drawn].sum(-1) / weights[drawn].sum(-1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
