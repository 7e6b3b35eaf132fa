"""Verdicts on two responses shown together, in both orders: from a label, from the end of a thought, or from a scalar
head.

The score of a response is the log of the share of its comparisons that it wins. If the two orders disagree, the scores
are equal, so pair accuracy counts one half.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch
from dwrl_fast.data import Preference
from dwrl_fast.dialog import read_choice
from dwrl_fast.encode import Comparison, Group, both_orders, comparison_requests, label_groups, read_thoughts
from dwrl_fast.scoring.judging import Judging, Progress
from dwrl_fast.scoring.scored import ScoredGroup


class LabelJudging(Judging):
    """p(A) / (p(A) + p(B)) at the label position, averaged over both orders. There is no thought, so votes have no
    effect.
    """

    kind = "comparison"

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[ScoredGroup]:
        requests = comparison_requests(rows, [both_orders(row) for row in rows], self.dialog)
        groups = label_groups(requests, self.dialog)
        read = self.runtime.run_batches(groups, self._read, progress)
        found = []
        for group, request, values in zip(groups, requests, read, strict=True):
            firsts, shares = self.shares(request.comparisons, [value for (value,) in values])
            scores = win_scores(group, request.comparisons, shares)
            found.append(ScoredGroup(group, scores, [[share] for share in firsts], request.comparisons))
        return found

    def _read(self, batch: Batch) -> list[list[list[float]]]:
        return batch.by_sequence(self.values(batch).double().tolist())

    def values(self, batch: Batch) -> Tensor:
        """[S], the value read at the end of each comparison."""
        head = self.runtime.model(batch, tokens=False)
        return head.scores(self.dialog.label_ids, "yes_no").exp()

    def shares(
        self, comparisons: Sequence[Comparison], values: list[float]
    ) -> tuple[list[float], list[tuple[float, float]]]:
        """From the values of all comparisons: the share of the response shown first, and the shares that count."""
        return values, [(p, 1 - p) for p in values]


class LeadJudging(LabelJudging):
    """sigmoid((h(a, b) - h(b, a)) / 2), where h, from a scalar head, is by how much the response shown first is better
    than the second, in nats. There is no thought, so votes have no effect.
    """

    def values(self, batch: Batch) -> Tensor:
        leads: Tensor = self.runtime.model(batch)
        return leads

    def shares(
        self, comparisons: Sequence[Comparison], values: list[float]
    ) -> tuple[list[float], list[tuple[float, float]]]:
        h = {comparison.places: lead for comparison, lead in zip(comparisons, values, strict=True)}
        verdicts = torch.tensor([(h[i, j] - h[j, i]) / 2 for i, j in h], dtype=torch.float64)
        shares = zip(verdicts.sigmoid().tolist(), (-verdicts).sigmoid().tolist(), strict=True)
        return torch.tensor(values, dtype=torch.float64).sigmoid().tolist(), list(shares)


class ChoiceJudging(Judging):
    """The verdict at the end of a thought: one greedy thought for each order, or the majority of `votes` sampled ones.

    An unreadable verdict counts as wrong: it counts for the response with the worse rank.
    """

    thinks = True
    kind = "comparison"

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[ScoredGroup]:
        requests = comparison_requests(rows, [both_orders(row) for row in rows], self.dialog)
        found = []
        for request, group in zip(requests, self.sample(requests, votes, seed), strict=True):
            choices, shares = read_thoughts(group, self.dialog, read_choice), []
            for comparison, some in zip(request.comparisons, choices, strict=True):
                counts = [some.count(0), some.count(1)]
                if comparison.right is not None:
                    counts[1 - comparison.right] += some.count(None)
                shares.append((counts[0] / votes, counts[1] / votes))
            verdicts = [[None if choice is None else 1.0 - choice for choice in some] for some in choices]
            scores = win_scores(group, request.comparisons, shares)
            found.append(ScoredGroup(group, scores, verdicts, request.comparisons))
            if progress is not None:
                progress(len(group.preference.responses))
        return found


def win_scores(
    group: Group, comparisons: Sequence[Comparison], shares: Sequence[tuple[float, float]]
) -> list[list[float]]:
    """K lists of one score: the log of the mean share of its comparisons that each response wins; -inf if it wins none.

    shares: for each comparison, the shares of the response shown first and of the second.
    """
    won: list[list[float]] = [[] for _ in group.preference.responses]
    for comparison, (first, second) in zip(comparisons, shares, strict=True):
        won[comparison.first].append(first)
        won[comparison.second].append(second)
    means = torch.tensor([sum(each) / len(each) for each in won], dtype=torch.float64)
    return [[value] for value in means.log().tolist()]
