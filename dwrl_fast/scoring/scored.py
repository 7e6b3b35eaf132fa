"""What a model made of one group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dwrl_fast.encode import Comparison, Group


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """scores: K lists of N in nats, for each response; the mean of their probabilities is the response's. Methods that
    compare responses, or whose verdict is a number, give K lists of one.
    verdicts: where they are no scores in nats, what each thought says, or what is read without one: for each response,
    or for each of `comparisons`, N numbers; of comparisons, 1 where the response shown first wins, 0 where the other
    does, a probability between. None if it cannot be read.
    token_scores: K scores a token, where a score is a response's log-prob.
    """

    group: Group
    scores: list[list[float]]
    verdicts: list[list[float | None]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    token_scores: list[float] = field(default_factory=list)

    @property
    def unparsable(self) -> int:
        """Verdicts that could not be read."""
        return sum(some.count(None) for some in self.verdicts)

    @property
    def first_shares(self) -> list[float]:
        """For each comparison with a verdict that could be read, the share of these for the response shown first."""
        read = [[verdict for verdict in some if verdict is not None] for some in self.verdicts if self.comparisons]
        return [sum(some) / len(some) for some in read if some]


def marginal_scores(groups: Sequence[ScoredGroup]) -> Tensor:
    """Log of the mean of exp(score) over each response's scores: float64 [P, K], nan where a group has fewer
    responses.
    """
    rows = [
        [torch.tensor(each, dtype=torch.float64).logsumexp(0).item() - math.log(len(each)) for each in g.scores]
        for g in groups
    ]
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64)
