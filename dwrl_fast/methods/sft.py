"""`sft`: supervised fine-tuning, on the best responses of preferences or on demonstrations of how to judge
(docs/methods.md).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Demonstration, Preference
from dwrl_fast.encode import Group, demonstration_group
from dwrl_fast.methods.method import Method, Tally
from dwrl_fast.scoring import PolicyScorer, Progress, Runtime, Scorer


class SupervisedFineTuning(Method):
    name = "sft"
    other_templates = ("pairwise", "pointwise", "direct")
    preparation = "encode"

    @classmethod
    def make_scorer(cls, runtime: Runtime, card: dict[str, Any]) -> Scorer:
        return PolicyScorer(runtime)

    @property
    def phases(self) -> tuple[str, ...]:
        return ("policy",)

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        groups = []
        for row in rows:
            groups.append(demonstration_group(row, self.dialog) if isinstance(row, Demonstration) else self._best(row))
            progress(len(row.responses))
        return groups, {}

    def _best(self, row: Preference) -> Group:
        best = row.responses[: row.ranks.count(1) or 1]
        return Group(row, [[self.dialog.completion(row.prompt, response)] for response in best])

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        """The mean over all trained tokens of the minibatch, labels among them."""
        head = self.model(batch, tokens=True)
        hidden, targets = head.token, batch.targets
        if right := [label for group in batch.groups for label in group.right]:
            labelled = torch.tensor([bool(group.right) for group in batch.groups for _ in group.flat]).to(hidden.device)
            labels = torch.tensor(self.dialog.label_ids).to(targets)[right]
            hidden, targets = torch.cat([hidden, head.score[labelled]]), torch.cat([targets, labels])
        logprob = ops.linear_logprob(hidden, head.weight, targets, bias=head.bias, softcap=head.softcap)
        tally.add("loss", -logprob)
        return -logprob.sum() / (minibatch.tokens + minibatch.labels)
