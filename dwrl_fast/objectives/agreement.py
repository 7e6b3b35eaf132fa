"""The agreement of scores with ranks: the accuracy in training and evaluation."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_grid(ranks: Sequence[Sequence[int]]) -> Tensor:
    """The ranks of P groups as [P, K] int64. 1 is the best rank; 0 pads groups with fewer than K responses."""
    width = max(map(len, ranks))
    return torch.tensor([[*one, *[0] * (width - len(one))] for one in ranks])


def ordered_pairs(ranks: Tensor) -> Tensor:
    """[P, K, K] bool: whether response i ranks before response j. ranks: [P, K], as `rank_grid` gives them."""
    return (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)


def order_accuracy(scores: Tensor, ranks: Tensor) -> Tensor:
    """The accuracy of each group: the share of its ordered pairs that the scores order in the same way, [Q] float64.

    scores: [P, K]. ranks: [P, K], as `rank_grid` gives them. Equal scores count one half. Q is the number of groups
    with an ordered pair; groups in which all responses tie are left out.
    """
    credit, some = order_credit(scores, ranks)
    return credit[some]


def order_credit(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """`order_accuracy` of all P groups [P] float64, and which of them have an ordered pair [P] bool.

    Groups without an ordered pair have accuracy 0. Does not synchronise the device.
    """
    ordered = ordered_pairs(ranks)
    count = ordered.sum((1, 2))
    one, other = scores[:, :, None], scores[:, None, :]  # not their difference: two infinite scores are equal
    credit = torch.where(ordered, (one > other).double() + 0.5 * (one == other), 0.0).sum((1, 2))
    return credit / count.clamp_min(1), count > 0
