"""The oracle of ranking likelihoods: every order is enumerated as a product of choice probabilities."""

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor


def order_loss(marginals: Tensor, order: Sequence[int]) -> Tensor:
    """Minus the log of the probability of `order`, each response out of those not yet chosen: [K] -> []."""
    p, left, likelihood = marginals.exp(), list(order), torch.ones((), dtype=marginals.dtype)
    for k in order:
        likelihood = likelihood * p[k] / p[left].sum()
        left.remove(k)
    return -likelihood.log()


def agreeing_orders(ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """The orders of the responses, best first, that agree with `ranks`: several where some tie."""
    return [order for order in permutations(range(len(ranks))) if sorted(ranks) == [ranks[k] for k in order]]


def mean_order_loss(marginals: Tensor, ranks: Sequence[int], margin: float = 0.0) -> Tensor:
    """The mean over the agreeing orders of the first marginals; for a pair with a margin its logistic loss."""
    if margin:
        return torch.log1p((marginals[1] - marginals[0] + margin).exp())
    return torch.stack([order_loss(marginals[: len(ranks)], order) for order in agreeing_orders(ranks)]).mean()
