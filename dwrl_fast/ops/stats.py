"""What `PolicyLoss.stats` holds, and how it combines over micro-batches and ranks.

stats is one float64 tensor on the loss's device: the entries of `STAT_SUMS`, which add, then those of `STAT_MAXIMA`, which take the
maximum. Over ranks: all-reduce `stats[SUMS]` with SUM and `stats[MAXIMA]` with MAX. All are over the trained rows, unweighted:

    tokens              how many rows were trained
    token_weight        sum of token_weight
    ratio, log_ratio    sums of g = pi/pi_old and of log g; mean ratio - 1 - mean log_ratio estimates KL(old || new)
    clipped             how many rows the clip left without a gradient
    kl                  sum of the KL estimate to the reference policy; NaN where none was given
    entropy             sum of the policy's entropy in nats; NaN from `policy_loss`, which is given no logits
    invalid             how many rows have a log-probability that is not finite: check it before the optimizer's step
    ratio_max, log_ratio_abs_max
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dwrl_fast.reference import STAT_MAXIMA, STAT_SUMS

SUMS = slice(0, len(STAT_SUMS))
MAXIMA = slice(len(STAT_SUMS), len(STAT_SUMS) + len(STAT_MAXIMA))


def combine_stats(stats: Iterable[Tensor]) -> Tensor:
    """The stats of several micro-batches as those of one, on the device. Raises if there is none."""
    stacked = torch.stack(list(stats))
    return torch.cat([stacked[:, SUMS].sum(0), stacked[:, MAXIMA].amax(0)])


def read_stats(stats: Tensor) -> dict[str, float]:
    """Counts and maxima as they are (tokens, token_weight, invalid), and the rest as means over trained rows. Synchronises."""
    values = dict(zip(STAT_SUMS + STAT_MAXIMA, stats.tolist(), strict=True))
    rows = max(values["tokens"], 1.0)
    return {k: v / rows if k in ("ratio", "log_ratio", "clipped", "kl", "entropy") else v for k, v in values.items()}
