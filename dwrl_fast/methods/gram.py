"""`gram`: both responses in one prompt, cross-entropy on the label A or B with a smoothed target (docs/method.md, 3).

No thought is written. Every pair is shown in one order, drawn from the seed; a verdict averages both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, comparison_requests, drawn_orders, label_groups
from dwrl_fast.methods.method import Method
from dwrl_fast.methods.metrics import StepMetrics


class Gram(Method):
    """Cross-entropy on the label of the better response, with a smoothed target."""

    name = "gram"
    summary = "both responses in one prompt; the label of the better one, with label smoothing, without thoughts"
    template = "direct"
    verdict = "label"
    smoothing: ClassVar[float] = 0.1  # share of the target for the other label

    @property
    def phases(self) -> tuple[str, ...]:
        return ("score",)

    def groups(self, rows: Sequence[Preference], seed: int) -> list[Group]:
        requests = comparison_requests(rows, drawn_orders(rows, step_seed(seed, "order", 0)), self.dialog)
        return [
            dataclasses.replace(group, labels=[each.right or 0 for each in request.comparisons])
            for group, request in zip(label_groups(requests, self.dialog), requests, strict=True)
        ]

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """-(1 - smoothing) log p(right label) - smoothing log p(wrong label), the mean over comparisons."""
        head = model(batch, tokens=False)
        right = torch.tensor([label for group in batch.groups for label in group.labels], device=head.score.device)
        labels = torch.tensor(self.dialog.label_ids, device=right.device)
        # Both labels of every row in one call of the head.
        logprob = head.logprobs(head.score.repeat(2, 1), torch.cat([labels[right], labels[1 - right]]))
        logprob = logprob.unflatten(0, (2, -1))
        losses = -(1 - self.smoothing) * logprob[0] - self.smoothing * logprob[1]
        metrics.add("loss", losses)
        metrics.add("train_accuracy", (logprob[0] > logprob[1]).double() + 0.5 * (logprob[0] == logprob[1]))
        metrics.add("label_mass", logprob.detach().exp().sum(0))
        return losses.sum() / minibatch.sequences
