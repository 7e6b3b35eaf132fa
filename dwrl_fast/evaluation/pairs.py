"""Pair accuracy: how often the preferred response scores higher, with a bootstrap interval."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwrl_fast.errors import DataError

RESAMPLES = 100, 100  # drawn in blocks, so that memory stays at 100 times the rows


@dataclass(frozen=True, slots=True)
class PairReport:
    """Over `groups` preference groups. accuracy: a fraction of 1, a tie counts one half; low, high: its 95 % bootstrap
    interval over groups. clipped: not under one half, as the papers print it. nll: mean -log sigmoid(s+ - s-), nats.
    """

    accuracy: float
    low: float
    high: float
    clipped: float
    ties: int
    groups: int
    nll: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        clipped = f" (clipped {self.clipped:.3f})" if self.clipped != self.accuracy else ""
        ties = f", {self.ties} ties" if self.ties else ""
        interval = f"[{self.low:.3f}, {self.high:.3f}]"
        return f"{self.accuracy:.3f}{clipped} {interval} on {self.groups} groups{ties}, nll {self.nll:.3f}"


def pair_report(scores: Tensor, seed: int = 0) -> PairReport:
    """scores [P, K] in nats, best response first, nan where absent. K > 2 counts the mean over the group's pairs."""
    if scores.shape[0] == 0:
        raise DataError("there is no pair to evaluate: the file is empty, or every row was dropped")
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    gap = scores[:, first].double() - scores[:, second].double()
    present = ~gap.isnan()
    if not present.any(-1).all():
        raise DataError("a row has fewer than two scores that are numbers: it has one response, or the model gives NaN")
    count = present.sum(-1)
    credit = (((gap > 0).double() + 0.5 * (gap == 0).double()) * present).sum(-1) / count
    nll = (-F.logsigmoid(gap.nan_to_num()) * present).sum(-1) / count
    low, high = bootstrap_interval(credit.numpy(), seed)
    accuracy = credit.mean().item()
    return PairReport(
        accuracy=accuracy,
        low=low,
        high=high,
        clipped=max(accuracy, 0.5),
        ties=int(((gap == 0) & present).sum()),
        groups=len(credit),
        nll=nll.mean().item(),
    )


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values [P], over rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    blocks, size = RESAMPLES
    means = [values[rng.integers(0, len(values), (size, len(values)))].mean(-1) for _ in range(blocks)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
