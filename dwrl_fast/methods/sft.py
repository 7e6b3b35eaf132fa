"""`sft`: supervised fine-tuning, on the best responses of preferences or on demonstrations of how to judge
(docs/methods.md).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Demonstration, Preference
from dwrl_fast.encode import Group, completion_groups, demonstration_group
from dwrl_fast.methods.method import Method
from dwrl_fast.methods.metrics import StepMetrics


class SupervisedFineTuning(Method):
    """Cross-entropy on responses, or on judgements."""

    name = "sft"
    summary = (
        "a policy: the best response is imitated; also judgements (rows with a thought and a verdict, docs/data.md), "
        "for another method to start from"
    )
    other_templates = ("pairwise", "pointwise", "direct")
    verdict = "likelihood"
    imitates = True

    @property
    def phases(self) -> tuple[str, ...]:
        return ("policy",)

    def groups(self, rows: Sequence[Preference], seed: int) -> list[Group]:
        return [
            demonstration_group(row, self.dialog) if isinstance(row, Demonstration) else self._best(row) for row in rows
        ]

    def _best(self, row: Preference) -> Group:
        (group,) = completion_groups([row], self.dialog)
        return dataclasses.replace(group, sequences=group.sequences[: row.ranks.count(1) or 1])

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """-log p, the mean over all trained tokens of the minibatch, labels among them."""
        head = model(batch, tokens=True)
        hidden, targets = head.token, batch.targets
        if right := [label for group in batch.groups for label in group.labels]:
            labelled = torch.tensor([bool(group.labels) for group in batch.groups for _ in group.flat])
            labels = torch.tensor(self.dialog.label_ids).to(targets)[right]
            hidden = torch.cat([hidden, head.score[labelled.to(hidden.device)]])
            targets = torch.cat([targets, labels])
        logprob = head.logprobs(hidden, targets)
        metrics.add("loss", -logprob)
        return -logprob.sum() / (minibatch.tokens + minibatch.labels)
