"""The weights of thoughts and pairs (DWRL Eq. 12): a few numbers per group, so plain PyTorch is used on every
device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dwrl_fast.errors import UserError
from dwrl_fast.ops import oracle
from dwrl_fast.ops.oracle import DualWeights, PreferenceWeights


def preference_weights(
    likelihood: Callable[[Tensor], Tensor], scores: Tensor, valid: Tensor | None = None
) -> PreferenceWeights:
    """The coefficients c = -df/dL [P, K] and weights w = softmax_i s [P, K, N] of a likelihood f (docs/method.md, 2.1).

    likelihood: f, from marginals L [P, K] to losses [P] in nats, differentiable. scores: s = log p(Yes) [P, K, N].
    valid: [P, K, N] bool, False for thoughts that are left out, so groups may have different K and N. L is
    logmeanexp_i s. For a pair under -log sigmoid(L+ - L-), c is (m, -m) with the misalignment weight m (DWRL Eq. 12).

    Returns PreferenceWeights(coefficients, weights, marginals, losses), detached. Raises UserError, which names the
    argument.
    """
    if scores.dim() != 3 or 0 in scores.shape[1:]:
        raise UserError(f"preference_weights: scores is {list(scores.shape)}; expected [P, K, N], K and N above 0")
    if valid is not None and (valid.shape != scores.shape or valid.dtype != torch.bool):
        shape = list(valid.shape)
        raise UserError(f"preference_weights: valid is {valid.dtype} {shape}; expected bool {list(scores.shape)}")
    return oracle.preference_weights(likelihood, scores, valid)


def dual_weights(scores_chosen: Tensor, scores_rejected: Tensor) -> DualWeights:
    """The misalignment weight m [B] and the self-normalised scores of each side [B, N], detached (DWRL Eq. 12).

    scores_chosen, scores_rejected: s = log p(Yes) [B, N]; N may differ between them. It is the pair form of
    `preference_weights`. Raises UserError, which names the argument.
    """
    for name, scores in (("scores_chosen", scores_chosen), ("scores_rejected", scores_rejected)):
        if scores.dim() != 2 or scores.shape[0] != scores_chosen.shape[0] or scores.shape[1] == 0:
            raise UserError(f"dual_weights: {name} is {list(scores.shape)}; expected [B, N], both of one B, N above 0")
    return oracle.dual_weights(scores_chosen, scores_rejected)
