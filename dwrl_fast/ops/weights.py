"""The weights of thoughts and pairs: a few numbers a group, so plain PyTorch in log space serves every device."""

from collections.abc import Callable

import torch
from torch import Tensor

from dwrl_fast.errors import UserError
from dwrl_fast.ops import oracle
from dwrl_fast.ops.oracle import DualWeights, PreferenceWeights


def preference_weights(
    likelihood: Callable[[Tensor], Tensor], scores: Tensor, valid: Tensor | None = None, *, backend: str = "auto"
) -> PreferenceWeights:
    """The coefficients c = -df/dL [P, K] and weights softmax_i s [P, K, N] of any preference likelihood (METHOD 2.1).

    likelihood: marginals L [P, K] -> loss [P], differentiable. scores [P, K, N] are log p(Yes); valid [P, K, N] bool
    leaves thoughts out, for ragged K and N. Returns PreferenceWeights(coefficients, weights, marginals, losses),
    detached.
    """
    _check("preference_weights", backend)
    if scores.dim() != 3 or 0 in scores.shape[1:]:
        raise UserError(f"preference_weights: scores is {list(scores.shape)}; expected [P, K, N], K and N above 0")
    if valid is not None and (valid.shape != scores.shape or valid.dtype != torch.bool):
        shape = list(valid.shape)
        raise UserError(f"preference_weights: valid is {valid.dtype} {shape}; expected bool {list(scores.shape)}")
    return oracle.preference_weights(likelihood, scores, valid)


def dual_weights(
    scores_chosen: Tensor, scores_rejected: Tensor, *, margin: Tensor | float | None = None, backend: str = "auto"
) -> DualWeights:
    """The misalignment weight m [B] and the self-normalised scores of either side [B, N], detached (DWRL Eq. 12).

    Scores are log p(Yes); margin (a number or [B]) makes m that of -log sigmoid(L^+ - L^- - margin).
    """
    _check("dual_weights", backend)
    for name, scores in (("scores_chosen", scores_chosen), ("scores_rejected", scores_rejected)):
        if scores.dim() != 2 or scores.shape[0] != scores_chosen.shape[0] or scores.shape[1] == 0:
            raise UserError(f"dual_weights: {name} is {list(scores.shape)}; expected [B, N], both of one B, N above 0")
    if isinstance(margin, Tensor) and margin.dim() and margin.shape != scores_chosen.shape[:1]:
        raise UserError(f"dual_weights: margin is {list(margin.shape)}; expected [B = {scores_chosen.shape[0]}]")
    return oracle.dual_weights(scores_chosen, scores_rejected, margin=margin)


def _check(operator: str, backend: str) -> None:
    if backend not in ("auto", "reference"):
        raise UserError(f"{operator}: backend is {backend!r}; it has one, 'reference' (plain PyTorch on any device)")
