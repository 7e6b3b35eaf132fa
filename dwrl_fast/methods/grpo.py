"""What `grpo-pair` and `grpo-point` share: thoughts that end with a verdict, rewarded, and the clipped objective."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group
from dwrl_fast.methods.generative import GenerativeMethod
from dwrl_fast.methods.method import Tally
from dwrl_fast.objectives.group_relative import group_advantage
from dwrl_fast.scoring import Progress


class GroupRelative(GenerativeMethod):
    """GRPO without a reference model: every thought's reward, standardised among those of its context."""

    @property
    def phases(self) -> tuple[str, ...]:
        return ("thought",)

    @abstractmethod
    def sample(self, rows: Sequence[Preference], seed: int, progress: Progress) -> list[Group]:
        """Groups with their thoughts and the rewards of these; rows in which nothing can be judged are left out."""

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        groups = self.sample(rows, seed, progress)
        if not groups:
            return groups, {}
        rewards = torch.tensor([r for group in groups for context in group.rewards for r in context])
        unread = sum(group.unparsable for group in groups) / len(rewards)
        return groups, self.sampled(groups) | {"reward": rewards.mean().item(), "unparsable": unread}

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        """The mean over all sequences of the minibatch of the mean over their tokens (DeepSeekMath, Eq. 3)."""
        advantages = [group_advantage(torch.tensor(rewards)) for group in batch.groups for rewards in group.rewards]
        advantage = torch.cat(advantages).to(batch.lengths.device)
        tally.add("advantage", advantage.abs())
        weight = batch.trained / (batch.lengths.clamp_min(1) * minibatch.sequences)
        loss = self.clipped_loss(self.model(batch, tokens=True), batch, advantage, weight, tally)
        tally.add("loss", loss * minibatch.sequences, count=len(batch.lengths))
        return loss
