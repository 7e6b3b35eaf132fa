"""`star-dpo`: DPO that prefers a right thought to a wrong thought about the same comparison. The frozen model is the
one that sampled them (docs/methods.md).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Request
from dwrl_fast.methods.dpo import BetaOptions
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.methods.star import Places, SelfTaught, select
from dwrl_fast.objectives.direct_preference import implicit_reward


class StarContrast(SelfTaught):
    """DPO on a right and a wrong thought about the same comparison."""

    name = "star-dpo"
    summary = "right thoughts are preferred to wrong ones"
    options = (*SelfTaught.options, BetaOptions)
    contrasts = True
    old_policy = "itself"
    default_beta: ClassVar[float] = 0.1

    def keep(self, groups: list[Group], seed: int) -> list[Group]:
        """For each comparison that has both, one right thought and one wrong one, drawn from `seed`."""
        rng = np.random.default_rng(step_seed(seed, "contrast", 0))
        right, wrong = ([self.judged(group, right=each) for group in groups] for each in (True, False))
        drawn = [_draw(*places, rng) for places in zip(right, wrong, strict=True)]
        return [one for group, places in zip(groups, drawn, strict=True) for one in select(group, places)]

    def figures(
        self, rows: Sequence[Preference], requests: Sequence[Request], sampled: list[Group], kept: list[Group],
        unread: int,
    ) -> dict[str, float]:  # fmt: skip
        logs = super().figures(rows, requests, sampled, kept, unread)
        for name, right in (("only_right", False), ("only_wrong", True)):
            logs[name] = float(sum(not some for group in sampled for some in self.judged(group, right=right)))
        return logs

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """-log sigmoid(beta (log-ratio of the right thought - that of the wrong one)), the mean over comparisons."""
        assert batch.old_logprob is not None
        head = model(batch, tokens=True)
        logprob = head.logprobs(head.token, batch.targets)
        beta = self.default_beta if self.config.beta is None else self.config.beta
        rewards = implicit_reward(logprob, batch.old_logprob, batch.lengths, beta)
        lead = rewards[::2] - rewards[1::2]
        losses = -F.logsigmoid(lead)
        metrics.add("loss", losses)
        metrics.add("reward_right", rewards[::2])
        metrics.add("reward_wrong", rewards[1::2])
        metrics.add("reward_accuracy", (lead > 0).double() + 0.5 * (lead == 0))
        return losses.sum() / (minibatch.sequences / 2)


def _draw(right: Places, wrong: Places, rng: np.random.Generator) -> Places:
    return [
        [int(rng.choice(good)), int(rng.choice(bad))] if good and bad else []
        for good, bad in zip(right, wrong, strict=True)
    ]
