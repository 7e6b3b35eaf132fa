"""`pairrm`: both responses in one input and a scalar head that compares them, in both orders (docs/methods.md)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, both_orders, comparison_requests, label_groups
from dwrl_fast.methods.method import Method
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.objectives.likelihood import preference_likelihood

RANKS = {0: (1, 2), 1: (2, 1), None: (1, 1)}  # by which of the two responses is better


class PairRM(Method):
    """A scalar head that gives by how much the first of two responses is better."""

    name = "pairrm"
    summary = "both responses in one prompt, with a scalar head"
    template = "direct"
    scalar = True
    verdict = "lead"

    @property
    def phases(self) -> tuple[str, ...]:
        return ("score",)

    def groups(self, rows: Sequence[Preference], seed: int) -> list[Group]:
        return label_groups(comparison_requests(rows, [both_orders(row) for row in rows], self.dialog), self.dialog)

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """The head gives h, by how much the first response is better than the second, in nats. The loss is the
        preference likelihood of the scores h and 0, with the margin or tie of the pair; the mean over all comparisons.
        """
        leads = model(batch)
        asked = [
            (each.right, group.preference.margin) for group in batch.groups for each in both_orders(group.preference)
        ]
        likelihood = preference_likelihood([RANKS[right] for right, _ in asked], [margin for _, margin in asked])
        losses = likelihood(torch.stack([leads, torch.zeros_like(leads)], -1))
        metrics.add("loss", losses)
        sign = torch.tensor([0 if right is None else 1 - 2 * right for right, _ in asked], device=leads.device)
        told = (leads * sign)[sign != 0]
        metrics.add("train_accuracy", (told > 0).double() + 0.5 * (told == 0))
        return losses.sum() / minibatch.sequences
