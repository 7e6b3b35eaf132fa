"""What the methods that train a language model on its own thoughts have in common."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods.method import Method, Tally
from dwrl_fast.models.model import HeadInputs
from dwrl_fast.scoring import fill_logprobs


class GenerativeMethod(Method):
    thinks = True
    card_options: ClassVar[tuple[str, ...]] = ("temperature", "max_completion_length")

    def __init__(self, config: TrainConfig, dialog: Dialog | SingleTurn, compute: Compute):
        if config.old_logprobs == "sampler" and not compute.float32:
            raise ConfigError(
                "--old_logprobs sampler needs a sampler that computes in float32, and this one computes in "
                f"{compute.dtype}: its rounding would pass for a change of the policy. Use recompute, or --dtype fp32."
            )
        super().__init__(config, dialog, compute)
        assert self.runtime.sampler is not None
        self.sampler = self.runtime.sampler

    def sampled(self, groups: list[Group]) -> dict[str, float]:
        """What is worth logging of thoughts just sampled; their old log-probs become the trainer's where they must."""
        logs = thought_figures(groups)
        source = self.config.old_logprobs
        if source == "recompute" or (source == "auto" and not self.sampler.float32):
            logs |= self.recompute_old_logprobs(groups)
        return logs

    @torch.no_grad()
    def recompute_old_logprobs(self, groups: Sequence[Group]) -> dict[str, float]:
        """The trainer's own log-probs in place of the sampler's, before anything is updated; how far the two were
        apart, in nats.
        """
        gaps = []
        for batch in self.layout.batches(groups):
            with self.compute.autocast():
                fresh = self.token_logprobs(self.model(batch, tokens=True), batch)
            assert batch.old_logprob is not None
            gaps.append((fresh - batch.old_logprob).abs())
            fill_logprobs(batch, fresh)
        gap = torch.cat(gaps)
        return {"sampler_gap_mean": gap.mean().item(), "sampler_gap_max": gap.max().item()}

    def token_logprobs(self, head: HeadInputs, batch: Batch) -> Tensor:
        """log pi(o_t | .) of every thought token, [T], differentiable in the head's inputs."""
        return ops.linear_logprob(
            head.token,
            head.weight,
            batch.targets,
            bias=head.bias,
            temperature=self.config.temperature,
            softcap=head.softcap,
        )

    def clipped_loss(
        self, head: HeadInputs, batch: Batch, advantage: Tensor, token_weight: Tensor, tally: Tally
    ) -> Tensor:
        """-sum_t weight min(g A, clip(g) A), from the advantage and the token weight of each sequence, both [S]."""
        config = self.config
        assert batch.old_logprob is not None
        result = ops.linear_policy_loss(
            head.token,
            head.weight,
            batch.targets,
            batch.old_logprob,
            advantage[batch.owner],
            token_weight[batch.owner],
            clip_low=config.epsilon,
            clip_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            temperature=config.temperature,
            softcap=head.softcap,
            bias=head.bias,
        )
        tally.policy.append(result.stats)
        return result.loss


def thought_figures(groups: Sequence[Group]) -> dict[str, float]:
    """How long thoughts are, in tokens, and how many were cut at the limit."""
    ended = [e for group in groups for response in group.ended for e in response]
    sizes = [sequence.thought.stop - sequence.thought.start for group in groups for sequence in group.flat]
    return {
        "thought_length": sum(sizes) / len(sizes),
        "thought_tokens": float(sum(sizes)),
        "truncation_rate": 1 - sum(ended) / len(ended),
    }
