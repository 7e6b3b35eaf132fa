from torch import Tensor

from dwrl_fast import reference
from dwrl_fast.reference import PolicyLoss


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    beta: float = 0.0,
    backend: str = "auto",
) -> PolicyLoss:
    return reference.linear_policy_loss(
        hidden, weight, targets, old_logprob, advantage, token_weight, clip_low=clip_low, clip_high=clip_high,
        temperature=temperature, softcap=softcap, bias=bias, ref_logprob=ref_logprob, beta=beta,
    )  # fmt: skip


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprob: Tensor | None = None,
    beta: float = 0.0,
    backend: str = "auto",
) -> PolicyLoss:
    return reference.policy_loss(
        logprob,
        old_logprob,
        advantage,
        token_weight,
        clip_low=clip_low,
        clip_high=clip_high,
        ref_logprob=ref_logprob,
        beta=beta,
    )
