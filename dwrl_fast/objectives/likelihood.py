"""Preference likelihoods f: from the log-marginal scores L [P, K] of K responses to a loss [P] in nats.

Every data format is one such function, and `ops.preference_weights` takes it as an argument (docs/method.md, 2.1). f is
a sum of weighted comparisons. In a comparison one response is chosen out of a set, with probability softmax(L). It
costs

    -log sigmoid(L_winner - logsumexp of the set's others - margin)

A pair is one comparison: the Bradley-Terry loss on the marginals, which phase A minimises (DWRL Eq. 13). A
Plackett-Luce ranking of K has K - 1 comparisons: each response against all that follow it. The loss of a tie is the
mean over the tied orders. It depends only on which of the b tied responses have not been placed yet, so 2^b sets are
enumerated, not b! orders.

Shapes: P groups, K responses of the largest group, C comparisons of the largest group, U different patterns of ranks.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor

Likelihood = Callable[[Tensor], Tensor]
Ranks = Sequence[int]

MAX_TIED = 7  # maximum responses of a ranking with ties


@dataclass(frozen=True, slots=True)
class Comparisons:
    """The comparisons of U patterns of ranks. A pattern with fewer than C comparisons is padded with weight 0.

    winner: [U, C] int64, the response that is chosen. others: [U, C, K] bool, the responses it is chosen against.
    weight: [U, C] float64.
    """

    winner: Tensor
    others: Tensor
    weight: Tensor


def preference_likelihood(ranks: Sequence[Ranks], margins: Sequence[float]) -> Likelihood:
    """The likelihood of a batch of P groups, each with any number of responses: marginals [P, K] -> losses [P] in nats.

    ranks: for each group the ranks of its responses; the smallest is the best, and equal ranks tie. In a group with
    fewer than K responses the last marginals are unused: they may hold anything, and their gradient is 0.
    margins: for each group, in nats, by how much the better response of a pair must lead; 0 for every other group.

    The losses have the dtype and device of the marginals. Raises ValueError if no likelihood is defined: for a group
    of one response, for a margin of anything but an ordered pair, and for a ranking of more than 7 responses with ties
    (it has to come as pairs). The likelihood raises ValueError for marginals of another shape.
    """
    for one, margin in zip(ranks, margins, strict=True):
        _check(one, margin)
    places = {pattern: u for u, pattern in enumerate(dict.fromkeys(map(tuple, ranks)))}
    table = _comparisons(tuple(places))
    rows = torch.tensor([places[tuple(one)] for one in ranks])
    required = torch.tensor(list(margins), dtype=torch.float64)[:, None]
    shape = len(ranks), table.others.shape[-1]

    def loss(marginals: Tensor) -> Tensor:
        if marginals.shape != shape:
            raise ValueError(f"marginals [P, K] are {list(marginals.shape)}, but the ranks are of {list(shape)}")
        # Copied without waiting for pending work of the device.
        winner, others, weight, margin = (
            x.to(marginals.device, non_blocking=True)
            for x in (table.winner[rows], table.others[rows], table.weight[rows], required)
        )
        # Differences first: added to a logarithm of sums as large as the scores, they would be lost to rounding.
        rivals = marginals[:, None].masked_fill(~others, -torch.inf)
        top = rivals.detach().amax(-1)
        lead = marginals.gather(1, winner) - top - (rivals - top[..., None]).logsumexp(-1) - margin.to(marginals)
        return -(weight.to(marginals) * F.logsigmoid(lead)).sum(-1)

    return loss


def _check(ranks: Ranks, margin: float) -> None:
    tied = len(set(ranks)) < len(ranks)
    if len(ranks) < 2:
        raise ValueError(f"a preference group has 2 responses or more, but this one has ranks {list(ranks)}")
    if tied and len(ranks) > MAX_TIED:
        raise ValueError(f"a ranking with ties has at most {MAX_TIED} responses, but this one has ranks {list(ranks)}")
    if margin and (tied or len(ranks) > 2):
        raise ValueError(f"only an ordered pair has a margin, but ranks {list(ranks)} have {margin}")


@functools.lru_cache
def _comparisons(patterns: tuple[tuple[int, ...], ...]) -> Comparisons:
    """The comparisons of U patterns of ranks; a pattern with fewer comparisons repeats its first one with weight 0."""
    found = [list(_comparisons_of(pattern)) for pattern in patterns]
    size = max(map(len, found))
    found = [some + [(*some[0][:2], 0.0)] * (size - len(some)) for some in found]
    responses = range(max(map(len, patterns)))
    return Comparisons(
        winner=torch.tensor([[winner for winner, _, _ in some] for some in found]),
        others=torch.tensor([[[k in others for k in responses] for _, others, _ in some] for some in found]),
        weight=torch.tensor([[weight for _, _, weight in some] for some in found], dtype=torch.float64),
    )


def _comparisons_of(ranks: tuple[int, ...]) -> Iterator[tuple[int, frozenset[int], float]]:
    """(winner, others, weight) of every comparison. While b tied responses are placed in random order, the s remaining
    ones are each of the comb(b, s) subsets with equal probability, and each of the s is equally likely to be next.
    """
    for rank in sorted(set(ranks)):
        tied = [k for k, own in enumerate(ranks) if own == rank]
        later = frozenset(k for k, own in enumerate(ranks) if own > rank)
        for size in range(1, len(tied) + 1):
            for remaining in combinations(tied, size):
                for winner in remaining:
                    if others := later.union(remaining) - {winner}:
                        yield winner, others, 1 / (size * comb(len(tied), size))
