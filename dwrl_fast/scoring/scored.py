"""The scores of one group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dwrl_fast.encode import Comparison, Group


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The scores and verdicts of one group.

    scores: K lists of N in nats, one list per response; the response's probability is the mean of theirs. Methods that
    compare responses, or whose verdict is a number, give K lists of one.
    verdicts: if they are not scores in nats, N numbers for each response, or for each of `comparisons`, read after the
    thoughts or without any. For comparisons: 1 if the response shown first wins, 0 if the other wins, or a probability
    between. None for a verdict that cannot be read.
    token_scores: K scores per token, if a score is the log-prob of a response.
    """

    group: Group
    scores: list[list[float]]
    verdicts: list[list[float | None]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    token_scores: list[float] = field(default_factory=list)

    @property
    def unparsable(self) -> int:
        """The number of unreadable verdicts."""
        return sum(some.count(None) for some in self.verdicts)

    @property
    def first_shares(self) -> list[float]:
        """For each comparison with readable verdicts, their share for the response shown first."""
        read = [[verdict for verdict in some if verdict is not None] for some in self.verdicts if self.comparisons]
        return [sum(some) / len(some) for some in read if some]


def marginal_scores(groups: Sequence[ScoredGroup]) -> Tensor:
    """Log of the mean of exp(score) over each response's scores: float64 [P, K], nan if a group has fewer responses."""
    rows = [
        [torch.tensor(each, dtype=torch.float64).logsumexp(0).item() - math.log(len(each)) for each in g.scores]
        for g in groups
    ]
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64)
