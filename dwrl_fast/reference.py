"""What each operator computes, in plain PyTorch: the specification, and the oracle of the tests.

Any floating dtype; float32 and narrower compute in float32 past the logits and return float32, float64 stays float64. Autograd does
the gradients. Nothing here is chunked or fast.

Shapes: T tokens, H hidden size, V vocabulary, B pairs or rows, P preference groups, K responses, N thoughts a response.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The entries of `PolicyLoss.stats`, over the trained rows: first what adds up over micro-batches and ranks, then what takes the maximum.
STAT_SUMS = ("tokens", "token_weight", "ratio", "log_ratio", "clipped", "kl", "entropy", "invalid")
STAT_MAXIMA = ("ratio_max", "log_ratio_abs_max")


class PolicyLoss(NamedTuple):
    """loss: scalar, differentiable. logprob [T]: detached, NaN where the row was not trained. stats: see `STAT_SUMS`, `STAT_MAXIMA`."""

    loss: Tensor
    logprob: Tensor
    stats: Tensor


class PreferenceWeights(NamedTuple):
    """coefficients [P, K], weights [P, K, N] (0 where not valid), marginals [P, K], losses [P]: all detached."""

    coefficients: Tensor
    weights: Tensor
    marginals: Tensor
    losses: Tensor


class DualWeights(NamedTuple):
    """misalignment [B], chosen [B, N], rejected [B, N]: all detached."""

    misalignment: Tensor
    chosen: Tensor
    rejected: Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None
) -> Tensor:
    """[T, H] x [V, H] -> [T, V]: the head in its own dtype, then (in float32 or float64) the soft-cap, then the temperature."""
    logits = _wide(F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    logp = logits_of(hidden, weight, bias, temperature, softcap).log_softmax(-1)
    logprob = logp.gather(-1, targets[:, None]).squeeze(-1)
    return (logprob, torch.special.entr(logp.exp()).sum(-1)) if return_entropy else logprob


def trained_rows(advantage: Tensor, token_weight: Tensor, beta: float) -> Tensor:
    """[T] bool: rows that move the loss. With no KL term a row of advantage 0 does not."""
    trained = token_weight != 0
    return trained if beta else trained & (advantage != 0)


def policy_stats(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    clip_low: float,
    clip_high: float,
    ref_logprob: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """The stats tensor (float64) of given trained rows. An absent reference or entropy is NaN: not known, rather than 0."""
    logprob, old, advantage = logprob.detach().double(), old_logprob.double(), advantage.double()
    log_ratio = logprob - old
    ratio = log_ratio.exp()
    clipped = torch.where(advantage > 0, ratio > 1 + clip_high, ratio < 1 - clip_low)
    unknown = torch.full_like(logprob, torch.nan)
    kl = unknown
    if ref_logprob is not None:
        kl = (ref_logprob.double() - logprob).expm1() - (ref_logprob.double() - logprob)
    sums = (
        torch.ones_like(logprob),
        token_weight.double(),
        ratio,
        log_ratio,
        (clipped & (advantage != 0)).double(),
        kl,
        unknown if entropy is None else entropy.detach().double(),
        (~logprob.isfinite()).double(),
    )
    maxima = (ratio, log_ratio.abs())
    zero = logprob.new_zeros(1)
    return torch.stack([*(x.sum() for x in sums), *(torch.cat([x, zero]).amax() for x in maxima)])


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
    entropy: Tensor | None = None,
) -> PolicyLoss:
    """Loss = -sum_t token_weight_t * [min(g_t A_t, clip(g_t, 1 - clip_low, 1 + clip_high) A_t) - beta KL_t], over trained rows

    g_t = exp(logprob_t - old_logprob_t) (DWRL Eq. 14); KL_t = exp(d) - d - 1 with d = ref_logprob_t - logprob_t.
    """
    rows = trained_rows(advantage, token_weight, beta).nonzero().squeeze(-1)
    taken = [
        None if x is None else x[rows] for x in (logprob, old_logprob, advantage, token_weight, ref_logprob, entropy)
    ]
    logp, old, adv, scale, ref, ent = taken
    assert logp is not None and old is not None and adv is not None and scale is not None
    stats = policy_stats(logp, old, adv, scale, clip_low, clip_high, ref, ent)
    ratio = (_wide(logp) - old).exp()
    gain = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    if beta:
        assert ref is not None
        d = ref - _wide(logp)
        gain = gain - beta * (d.expm1() - d)
    loss = -(scale * gain).sum()
    kept = torch.full_like(_wide(logprob.detach()), torch.nan).index_copy(0, rows, _wide(logp.detach()))
    return PolicyLoss(loss, kept, stats)


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
) -> PolicyLoss:
    """`policy_loss` of `linear_logprob`, where only the trained rows meet the head."""
    rows = trained_rows(advantage, token_weight, beta).nonzero().squeeze(-1)
    some = linear_logprob(
        hidden[rows], weight, targets[rows], bias=bias, temperature=temperature, softcap=softcap, return_entropy=True
    )
    blank = torch.full(targets.shape, torch.nan, dtype=some[0].dtype, device=hidden.device)
    logprob, entropy = (blank.index_copy(0, rows, x) for x in some)
    return policy_loss(
        logprob, old_logprob, advantage, token_weight, clip_low=clip_low, clip_high=clip_high, ref_logprob=ref_logprob,
        beta=beta, entropy=entropy,
    )  # fmt: skip


def yes_no_logprob(
    hidden: Tensor,
    weight: Tensor,
    yes_id: int,
    no_id: int,
    *,
    normalization: str = "vocab",
    bias: Tensor | None = None,
    softcap: float | None = None,
    return_mass: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """S = log p(Yes) over the vocabulary ("vocab", the papers') or over the two labels ("yes_no"); mass = p(Yes) + p(No), detached."""
    logits = logits_of(hidden, weight, bias, softcap=softcap)
    logp = logits.log_softmax(-1)
    score = logp[:, yes_id] if normalization == "vocab" else F.logsigmoid(logits[:, yes_id] - logits[:, no_id])
    return (score, logp[:, [yes_id, no_id]].detach().exp().sum(-1)) if return_mass else score


def preference_weights(
    likelihood: Callable[[Tensor], Tensor], scores: Tensor, valid: Tensor | None = None
) -> PreferenceWeights:
    """METHOD 2.1: L_k = logmeanexp_i s_ki; c_k = -df/dL_k; w_k = softmax_i s_ki, for f = likelihood: [P, K] -> [P], differentiable.

    `valid` [P, K, N] bool leaves thoughts out of mean and softmax. A response without any valid thought gets weights 0 and L = 0.
    """
    scores = _wide(scores.detach())
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    masked = scores.masked_fill(~valid, -torch.inf)
    some = valid.any(-1)
    masked = torch.where(some[..., None], masked, torch.zeros_like(masked))
    count = torch.where(some, valid.sum(-1), valid.shape[-1])
    marginals = masked.logsumexp(-1) - count.log()
    weights = masked.softmax(-1) * valid
    with torch.enable_grad():
        leaf = marginals.requires_grad_()
        losses = likelihood(leaf)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return PreferenceWeights(-gradient, weights, leaf.detach(), losses.detach())


def dual_weights(
    scores_chosen: Tensor, scores_rejected: Tensor, *, margin: Tensor | float | None = None
) -> DualWeights:
    """M = sigmoid(L^- - L^+ + margin), with L = logmeanexp_i s_i, and the self-normalised scores softmax_i s_i of either side."""
    chosen, rejected = _wide(scores_chosen.detach()), _wide(scores_rejected.detach())
    log_n = torch.tensor([chosen.shape[-1], rejected.shape[-1]], dtype=chosen.dtype, device=chosen.device).log()
    gap = (rejected.logsumexp(-1) - log_n[1]) - (chosen.logsumexp(-1) - log_n[0])
    m = torch.sigmoid(gap if margin is None else gap + margin)
    return DualWeights(m, chosen.softmax(-1), rejected.softmax(-1))
