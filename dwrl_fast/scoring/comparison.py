"""Verdicts on two responses shown together, each pair in both orders: by a label, by what a thought ends with, or by a
scalar head.

A response's score is the log of the share of its contests that it wins, so that equal scores are a tie of the two
orders, as pair accuracy averages them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch
from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.dialog import SingleTurn, read_choice
from dwrl_fast.encode import Comparison, Group, both_orders, comparison_contexts, label_groups
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring.scorer import Kind, Progress, Runtime


@dataclass(frozen=True, slots=True)
class LabelScorer:
    """p(A) / (p(A) + p(B)) at the label position, averaged over both orders; no thought, so votes change nothing."""

    thinks: ClassVar[bool] = False
    kind: ClassVar[Kind] = "comparison"
    runtime: Runtime

    @property
    def dialog(self) -> SingleTurn:
        return self.runtime.dialog

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[Group]:
        asked = [both_orders(row) for row in rows]
        groups = label_groups(rows, asked, self.dialog)
        read = _each_comparison(self.runtime, groups, self._first, progress)
        for group, comparisons, firsts in zip(groups, asked, read, strict=True):
            group.first_shares, group.verdicts = firsts, [[share] for share in firsts]
            group.scores = win_scores(group, comparisons, [(p, 1 - p) for p in firsts])
        return groups

    def _first(self, batch: Batch) -> Tensor:
        head = self.runtime.model(batch, tokens=False)
        labels = self.dialog.label_ids or (0, 0)
        return ops.yes_no_logprob(
            head.score, head.weight, *labels, normalization="yes_no", bias=head.bias, softcap=head.softcap
        ).exp()


@dataclass(frozen=True, slots=True)
class ContestScorer:
    """sigmoid((h(a, b) - h(b, a)) / 2), where h, of a scalar head, is by how much the response shown first leads the
    second, in nats; no thought, so votes change nothing.
    """

    thinks: ClassVar[bool] = False
    kind: ClassVar[Kind] = "comparison"
    runtime: Runtime

    @property
    def dialog(self) -> SingleTurn:
        return self.runtime.dialog

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[Group]:
        asked = [both_orders(row) for row in rows]
        groups = label_groups(rows, asked, self.dialog)
        read = _each_comparison(self.runtime, groups, self.runtime.model, progress)
        for group, comparisons, leads in zip(groups, asked, read, strict=True):
            h = {comparison.places: lead for comparison, lead in zip(comparisons, leads, strict=True)}
            verdicts = torch.tensor([(h[i, j] - h[j, i]) / 2 for i, j in h], dtype=torch.float64)
            shares = zip(verdicts.sigmoid().tolist(), (-verdicts).sigmoid().tolist(), strict=True)
            group.first_shares = torch.tensor(leads, dtype=torch.float64).sigmoid().tolist()
            group.verdicts = [[share] for share in group.first_shares]
            group.scores = win_scores(group, comparisons, list(shares))
        return groups


@dataclass(frozen=True, slots=True)
class ChoiceScorer:
    """The verdict that a thought ends with: one greedy thought for each order, or the votes of `votes` sampled ones.

    One that cannot be read is wrong, whichever response is the better: it counts for the one of the worse rank.
    """

    thinks: ClassVar[bool] = True
    kind: ClassVar[Kind] = "comparison"
    runtime: Runtime
    temperature: float
    max_tokens: int

    @property
    def dialog(self) -> SingleTurn:
        return self.runtime.dialog

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[Group]:
        assert self.runtime.sampler is not None
        asked = [both_orders(row) for row in rows]
        groups = sample_groups(
            rows,
            comparison_contexts(rows, asked, self.dialog),
            self.dialog,
            self.runtime.sampler,
            votes,
            max_tokens=self.max_tokens,
            temperature=0.0 if votes == 1 else self.temperature,
            seed=step_seed(seed, "votes", votes),
        )
        for group, comparisons in zip(groups, asked, strict=True):
            shares = []
            for comparison, choices in zip(comparisons, read_choices(group, self.dialog), strict=True):
                unread = choices.count(None)
                group.unparsable += unread
                counts = [choices.count(0), choices.count(1)]
                if unread < votes:
                    group.first_shares.append(counts[0] / (votes - unread))
                if comparison.right is not None:
                    counts[1 - comparison.right] += unread
                shares.append((counts[0] / votes, counts[1] / votes))
                group.verdicts.append([None if choice is None else 1.0 - choice for choice in choices])
            group.scores = win_scores(group, comparisons, shares)
            if progress is not None:
                progress(len(group.preference.responses))
        return groups


def _each_comparison(
    runtime: Runtime, groups: Sequence[Group], read: Callable[[Batch], Tensor], progress: Progress | None
) -> list[list[float]]:
    """What `read` gives each comparison of each of `groups`; it takes a batch and gives [S]."""
    found: dict[int, list[float]] = {}
    for batch, scores in runtime.run_batches(groups, read):
        values = iter(scores.double().tolist())
        for group in batch.groups:
            found[id(group)] = [next(values) for _ in group.sequences]
            if progress is not None:
                progress(len(group.preference.responses))
    return [found[id(group)] for group in groups]


def read_choices(group: Group, dialog: SingleTurn) -> list[list[int | None]]:
    """The verdict of every thought of every comparison; None where it cannot be read."""
    decode = dialog.tokenizer.decode
    return [
        [read_choice(decode(sequence.ids[sequence.thought], skip_special_tokens=False)) for sequence in sequences]
        for sequences in group.sequences
    ]


def win_scores(
    group: Group, comparisons: Sequence[Comparison], shares: Sequence[tuple[float, float]]
) -> list[list[float]]:
    """K lists of one score: the log of the mean share of its contests that each response wins; -inf where it wins none.

    shares: for each comparison, those of the response shown first and of the one shown second.
    """
    won: list[list[float]] = [[] for _ in group.preference.responses]
    for comparison, (first, second) in zip(comparisons, shares, strict=True):
        won[comparison.first].append(first)
        won[comparison.second].append(second)
    means = torch.tensor([sum(each) / len(each) for each in won], dtype=torch.float64)
    return [[value] for value in means.log().tolist()]
