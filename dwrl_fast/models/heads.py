"""The inputs of the head's operators, and their results: log-probs of tokens, scores, the clipped loss."""

import torch.nn.functional as F
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.ops import PolicyLoss


class HeadInputs:
    """The hidden states before the head and the head's weights, for S sequences with T thought tokens. Not a dataclass:
    FSDP would register hooks on every tensor of a dataclass at each pass, and again and again on the weight.

    score: [S, H], the hidden states at the sequences' last tokens. token: [T, H], the hidden states that predict the
    thoughts' tokens, or [0, H] if they were not requested. weight: [V, H]. bias: [V]. softcap: of the logits.
    """

    __slots__ = ("bias", "score", "softcap", "token", "weight")

    def __init__(self, score: Tensor, token: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None):
        self.score, self.token = score, token
        self.weight, self.bias, self.softcap = weight, bias, softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [R, V] in float32 for hidden states [R, H], for sampling. Not differentiable."""
        logits = F.linear(hidden, self.weight, self.bias).float()
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """[R], log p of the targets [R] given the hidden states [R, H] (score or token), in nats, differentiable."""
        return ops.linear_logprob(
            hidden, self.weight, targets, bias=self.bias, temperature=temperature, softcap=self.softcap
        )

    def scores(self, labels: tuple[int, int], normalization: str) -> Tensor:
        """[S], the score s: the log-probability of the first of two labels in nats, differentiable.

        See `ops.yes_no_logprob`.
        """
        return ops.yes_no_logprob(
            self.score, self.weight, *labels, normalization=normalization, bias=self.bias, softcap=self.softcap
        )

    def scores_and_mass(self, labels: tuple[int, int], normalization: str) -> tuple[Tensor, Tensor]:
        """`scores`, and the probability of both labels together [S], detached."""
        return ops.yes_no_logprob(
            self.score,
            self.weight,
            *labels,
            normalization=normalization,
            bias=self.bias,
            softcap=self.softcap,
            return_mass=True,
        )

    def policy_loss(
        self,
        targets: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        token_weight: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        temperature: float,
    ) -> PolicyLoss:
        """The clipped policy loss (DWRL Eq. 14) over the T thought tokens; all tensors are [T].

        See `ops.linear_policy_loss`.
        """
        return ops.linear_policy_loss(
            self.token,
            self.weight,
            targets,
            old_logprob,
            advantage,
            token_weight,
            clip_low=clip_low,
            clip_high=clip_high,
            temperature=temperature,
            softcap=self.softcap,
            bias=self.bias,
        )
