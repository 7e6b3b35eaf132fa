"""Dual-weighted RL as pure functions of scores and weights.

Phase A trains the score, phase B the thoughts; the joint form takes both from one forward. Coefficients c and weights w
come detached from `ops.preference_weights`; with c_k = -df/dL_k, which is (m, -m) for a pair, one formula serves
every likelihood.

Shapes: P groups, K responses, N thoughts. `valid` [P, K, N] masks absent thoughts; a masked *training* of a thought
never changes n.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ThoughtSignal:
    """What phase B gives every token of a thought, both [P, K, N]: the signed advantage A_i, and token_weight >= 0."""

    advantage: Tensor
    token_weight: Tensor


def effective_coefficients(coefficients: Tensor, misalignment_weight: bool) -> Tensor:
    """c [P, K], or its sign where the misalignment weight is switched off (docs/method.md, 2.1); 0 stays 0."""
    return coefficients if misalignment_weight else coefficients.sign()


def score_objective(scores: Tensor, coefficients: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """Phase A (DWRL Eq. 13), summed over groups: -sum_k c_k sum_i w_ki s_ki, whose gradient is that of f itself."""
    return -(coefficients[..., None] * weights * scores).masked_fill(~valid, 0).sum()


def centred_reward(weights: Tensor, valid: Tensor) -> Tensor:
    """w_ki - 1/n_k, [P, K, N] (DWRL Eq. 14's advantage before its sign)."""
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    return (weights - 1 / count).masked_fill(~valid, 0)


def standardised_reward(weights: Tensor, valid: Tensor) -> Tensor:
    """(w - mean) / (std + 1e-4) within a response, [P, K, N], as BTPO's authors train it; std divides by n - 1."""
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    centred = centred_reward(weights, valid)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    return centred / (variance.sqrt() + 1e-4)


def thought_signal(
    coefficients: Tensor, reward: Tensor, lengths: Tensor, valid: Tensor, trained: Tensor, normalization: str
) -> ThoughtSignal:
    """Phase B (DWRL Eq. 14), summed over groups: advantage and weight of every thought's tokens.

    `paper`: each token weighs |c| / (n |o|).  `likelihood`: |c|, a plain sum over tokens, so that A + B is Eq. 12.
    lengths [P, K, N] is |o| with the end token; trained [P, K, N] drops thoughts cut at the limit when they are masked.
    """
    c = coefficients[..., None]
    weight = c.abs().expand_as(reward)
    if normalization == "paper":
        weight = weight / (valid.sum(-1, keepdim=True).clamp_min(1) * lengths.clamp_min(1))
    return ThoughtSignal(advantage=c.sign() * reward, token_weight=weight.masked_fill(~(valid & trained), 0))
