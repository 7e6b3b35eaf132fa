"""What `grpo-pair` and `grpo-point` share: rewarded thoughts that end with a verdict, and the clipped objective."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Request
from dwrl_fast.methods.generative import ClippedMethod
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.objectives.group_relative import group_advantage


class GroupRelative(ClippedMethod):
    """GRPO without a reference model: the reward of every thought, standardised over the thoughts of its context."""

    @property
    def phases(self) -> tuple[str, ...]:
        return ("thought",)

    def figures(
        self, rows: Sequence[Preference], requests: Sequence[Request], sampled: list[Group], kept: list[Group],
        unread: int,
    ) -> dict[str, float]:  # fmt: skip
        if not sampled:
            return {}
        rewards = torch.tensor([reward for group in sampled for some in group.rewards for reward in some])
        read = {"reward": rewards.mean().item(), "unparsable": unread / len(rewards)}
        return super().figures(rows, requests, sampled, kept, unread) | read

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """The mean over all sequences of the minibatch of the mean over their tokens (DeepSeekMath, Eq. 3)."""
        advantages = [group_advantage(torch.tensor(some)) for group in batch.groups for some in group.rewards]
        advantage = torch.cat(advantages).to(batch.lengths.device)
        metrics.add("advantage", advantage.abs())
        weight = batch.trained / (batch.lengths.clamp_min(1) * minibatch.sequences)
        loss = self.clipped_loss(model(batch, tokens=True), batch, advantage, weight, metrics)
        metrics.add("loss", loss * minibatch.sequences, count=len(batch.lengths))
        return loss
