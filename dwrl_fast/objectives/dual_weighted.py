"""Dual-weighted RL (DWRL, arXiv 2510.15242; docs/method.md, 2) as pure functions of scores and weights.

Phase A trains the score and phase B trains the thoughts. The joint form (BTPO) adds both from one forward pass.
The coefficients c and the weights w come detached from `ops.preference_weights`. c_k = -df/dL_k, where f is the
preference likelihood and L_k the log-marginal score of response k. A pair has c = (m, -m), with m the misalignment
weight, so one formula serves every likelihood (docs/method.md, 2.1).

Shapes: P groups, K responses, N thoughts. `valid` [P, K, N] bool is False where a response has fewer than N thoughts.
n_k is the number of valid thoughts of response k. A thought that is valid but not trained still counts in n_k.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ThoughtSignal:
    """The advantage and weight of phase B for every token of a thought, as arguments of `ops.linear_policy_loss`.

    advantage: [P, K, N], the signed A_i of Eq. 14. token_weight: [P, K, N], 0 or more; 0 trains nothing.
    """

    advantage: Tensor
    token_weight: Tensor


def effective_coefficients(coefficients: Tensor, misalignment_weight: bool) -> Tensor:
    """The coefficients [P, K] unchanged, or their sign if `misalignment_weight` is off (the papers' ablation).

    A coefficient of 0 stays 0 (docs/method.md, 2.1).
    """
    return coefficients if misalignment_weight else coefficients.sign()


def score_objective(scores: Tensor, coefficients: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """Phase A (DWRL Eq. 13), summed over the groups: -sum_k c_k sum_i w_ki s_ki, a scalar.

    scores: s [P, K, N], log p(Yes) in nats, differentiated. coefficients: c [P, K], constant. weights: w [P, K, N],
    constant. For a pair this is -m sum_i (w_i+ s_i+ - w_i- s_i-). Its gradient in the scores is that of the likelihood
    f itself (docs/method.md, 2.2, point 1). Its value is not meaningful; report `PreferenceWeights.losses` instead.
    """
    return -(coefficients[..., None] * weights * scores).masked_fill(~valid, 0).sum()


def centred_reward(weights: Tensor, valid: Tensor) -> Tensor:
    """w_ki - 1/n_k [P, K, N]: the advantage of DWRL Eq. 14 before its sign. 0 for thoughts that are not valid."""
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    return (weights - 1 / count).masked_fill(~valid, 0)


def standardised_reward(weights: Tensor, valid: Tensor) -> Tensor:
    """(w - mean) / (std + 1e-4) over the thoughts of each response, [P, K, N], as BTPO standardises its reward.

    The standard deviation divides by n_k - 1. A single thought gets 0.
    """
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    centred = centred_reward(weights, valid)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    return centred / (variance.sqrt() + 1e-4)


def thought_signal(
    coefficients: Tensor, reward: Tensor, lengths: Tensor, valid: Tensor, trained: Tensor, normalization: str
) -> ThoughtSignal:
    """Phase B (DWRL Eq. 14), summed over the groups: the advantage and the weight of each thought's tokens.

    coefficients: c [P, K]. reward: `centred_reward` or `standardised_reward` [P, K, N]. lengths: |o| [P, K, N], in
    tokens, with the end token. trained: [P, K, N] bool, False for a thought that is left out (one cut at the token
    limit, under `truncated_thoughts = mask`). normalization: "paper" gives each token the weight |c| / (n |o|);
    anything else, "likelihood", gives it |c|, a plain sum over tokens, and phase A + phase B is then Eq. 12.
    """
    c = coefficients[..., None]
    weight = c.abs().expand_as(reward)
    if normalization == "paper":
        weight = weight / (valid.sum(-1, keepdim=True).clamp_min(1) * lengths.clamp_min(1))
    return ThoughtSignal(advantage=c.sign() * reward, token_weight=weight.masked_fill(~(valid & trained), 0))
