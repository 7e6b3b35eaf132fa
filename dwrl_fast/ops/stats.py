"""The contents of `PolicyLoss.stats`, and how they are combined over micro-batches and ranks.

One float64 tensor on the loss's device: first the entries of `STAT_SUMS`, which are summed, then those of
`STAT_MAXIMA`, of which the maximum is taken. Over ranks: all-reduce `stats[SUMS]` with SUM and `stats[MAXIMA]` with
MAX. All are over the trained rows, unweighted:

    tokens              number of trained rows
    token_weight        sum of token_weight
    ratio, log_ratio    sums of g = pi/pi_old and of log g; mean ratio - 1 - mean log_ratio estimates KL(old || new)
    clipped             number of rows without policy gradient because of the clip
    kl                  sum of the KL estimate to the reference policy; NaN if none was given
    entropy             sum of the policy's entropy in nats; NaN if `policy_loss` was given none
    invalid             number of rows whose log-probability is not finite: check it before the optimizer's step
    ratio_max, log_ratio_abs_max    NaN if any row's value is NaN
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dwrl_fast.ops.oracle import STAT_MAXIMA, STAT_SUMS

SUMS = slice(0, len(STAT_SUMS))
MAXIMA = slice(len(STAT_SUMS), len(STAT_SUMS) + len(STAT_MAXIMA))
_MEANS = ("ratio", "log_ratio", "clipped", "kl", "entropy")


def combine_stats(stats: Iterable[Tensor]) -> Tensor:
    """The stats of several micro-batches (at least one) combined into those of one batch, on their device."""
    stacked = torch.stack(list(stats))
    return torch.cat([stacked[:, SUMS].sum(0), stacked[:, MAXIMA].amax(0)])


def read_stats(stats: Tensor) -> dict[str, float]:
    """The entries by name: counts, sums of weights and maxima unchanged, the others as means over the trained rows.

    Waits for the device.
    """
    values = dict(zip(STAT_SUMS + STAT_MAXIMA, stats.tolist(), strict=True))
    rows = max(values["tokens"], 1.0)
    return {name: value / rows if name in _MEANS else value for name, value in values.items()}


def empty_stats(like: Tensor) -> Tensor:
    """An uninitialised tensor with the shape and dtype of stats, on the device of `like`."""
    return like.new_empty(MAXIMA.stop, dtype=torch.float64)
