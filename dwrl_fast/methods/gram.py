"""`gram`: both responses in one prompt, cross-entropy on the label A or B with its target smoothed (docs/method.md, 3).

No thought is written. Every pair is shown in one order, drawn from the seed; a verdict averages both.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, drawn_orders, label_groups
from dwrl_fast.methods.method import Method, Tally
from dwrl_fast.scoring import LabelScorer, Progress, Runtime, Scorer


class Gram(Method):
    name = "gram"
    template = "direct"
    preparation = "encode"
    smoothing: ClassVar[float] = 0.1  # how much of the target the other label gets

    @classmethod
    def make_scorer(cls, runtime: Runtime, card: dict[str, Any]) -> Scorer:
        return LabelScorer(runtime)

    @property
    def phases(self) -> tuple[str, ...]:
        return ("score",)

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        drawn = drawn_orders(rows, step_seed(seed, "order", 0))
        asked = [(row, some) for row, some in zip(rows, drawn, strict=True) if some]
        groups = label_groups([row for row, _ in asked], [some for _, some in asked], self.dialog)
        for group, (row, comparisons) in zip(groups, asked, strict=True):
            group.right = [comparison.right or 0 for comparison in comparisons]
            progress(len(row.responses))
        return groups, {}

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        head = self.model(batch, tokens=False)
        right = torch.tensor([r for group in batch.groups for r in group.right], device=head.score.device)
        labels = torch.tensor(self.dialog.label_ids, device=right.device)
        # Both labels of every row in one pass of the head.
        logprob = ops.linear_logprob(
            head.score.repeat(2, 1),
            head.weight,
            torch.cat([labels[right], labels[1 - right]]),
            bias=head.bias,
            softcap=head.softcap,
        ).unflatten(0, (2, -1))
        losses = -(1 - self.smoothing) * logprob[0] - self.smoothing * logprob[1]
        tally.add("loss", losses)
        tally.add("train_accuracy", (logprob[0] > logprob[1]).double() + 0.5 * (logprob[0] == logprob[1]))
        tally.add("label_mass", logprob.detach().exp().sum(0))
        return losses.sum() / minibatch.sequences
