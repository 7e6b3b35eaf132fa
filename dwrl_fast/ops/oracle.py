"""The oracle: the definition of each operator in plain PyTorch. Tests compare all backends with it.

Every floating dtype is accepted. float64 stays float64. Narrower dtypes compute in float32 from the logits on and
return float32. Autograd computes the gradients. Nothing here is chunked or fast, and arguments are not checked.

Shapes: T tokens, H hidden size, V vocabulary, B pairs or rows, P preference groups, K responses, N thoughts per
response.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# The entries of `PolicyLoss.stats`, over trained rows: first those that are summed over micro-batches, then those of
# which the maximum is taken.
STAT_SUMS = ("tokens", "token_weight", "ratio", "log_ratio", "clipped", "kl", "entropy", "invalid")
STAT_MAXIMA = ("ratio_max", "log_ratio_abs_max")


class PolicyLoss(NamedTuple):
    """The result of the policy losses.

    loss: a differentiable scalar. logprob: [T], detached, NaN in rows that are not trained. stats: float64, the entries
    of `STAT_SUMS` and then of `STAT_MAXIMA`, detached (`dwrl_fast.ops.stats` says what they are).
    """

    loss: Tensor
    logprob: Tensor
    stats: Tensor


class PreferenceWeights(NamedTuple):
    """The inputs of phases A and B (docs/method.md, 2.1). All are detached.

    coefficients: c = -df/dL [P, K]. weights: w [P, K, N], 0 where a thought is not valid. marginals: L [P, K], in nats.
    losses: f(L) [P], in nats.
    """

    coefficients: Tensor
    weights: Tensor
    marginals: Tensor
    losses: Tensor


class DualWeights(NamedTuple):
    """The weights of pairs (DWRL Eq. 12). All are detached.

    misalignment: m [B]. chosen, rejected: the self-normalised scores w of each side [B, N].
    """

    misalignment: Tensor
    chosen: Tensor
    rejected: Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None
) -> Tensor:
    """[T, H] x [V, H] -> [T, V]: softcap tanh(x / softcap) / temperature, x the head's output with its bias [V].

    The product is in hidden's dtype; everything after it is in float32, or float64 for float64.
    """
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
    """[T] log p(target) in nats; with `return_entropy` also the entropy [T] in nats. targets: [T] int64."""
    logp = logits_of(hidden, weight, bias, temperature, softcap).log_softmax(-1)
    logprob = logp.gather(-1, targets[:, None]).squeeze(-1)
    if not return_entropy:
        return logprob
    return logprob, -(logp.exp() * logp.clamp_min(-1e4)).sum(-1)  # 0 log 0 = 0, also in the gradient


def trained_rows(advantage: Tensor, token_weight: Tensor, beta: float) -> Tensor:
    """[T] bool: the rows that contribute to the loss. Without a KL term (beta 0), rows with advantage 0 do not."""
    trained = token_weight != 0
    return trained if beta else trained & (advantage != 0)


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
    """The loss -sum_t token_weight_t [min(g_t A_t, clip(g_t, 1 - clip_low, 1 + clip_high) A_t) - beta KL_t].

    g_t = exp(logprob_t - old_logprob_t) (DWRL Eq. 14; PPO, arXiv 1707.06347, Eq. 7). KL_t = exp(d) - d - 1 with
    d = ref_logprob_t - logprob_t estimates KL(policy || reference) (DeepSeekMath, arXiv 2402.03300, Eq. 4). All
    arguments are [T]; only logprob is differentiated. Only `trained_rows` count; the others may hold anything.
    """
    trained = trained_rows(advantage, token_weight, beta)
    lp, old, adv, scale = (
        torch.where(trained, _wide(x), 0.0)
        for x in (logprob, old_logprob.detach(), advantage.detach(), token_weight.detach())
    )
    ref = None if ref_logprob is None else torch.where(trained, _wide(ref_logprob.detach()), 0.0)
    log_ratio = lp - old
    ratio = log_ratio.detach().exp()
    clipped = ((adv > 0) & (ratio > 1 + clip_high)) | ((adv < 0) & (ratio < 1 - clip_low))
    still = clipped | (adv == 0)  # an infinite ratio must not be multiplied by zero
    bound = torch.where(adv > 0, torch.full_like(adv, 1 + clip_high), 1 - clip_low)
    gain = torch.where(still, bound, torch.where(still, 0.0, log_ratio).exp()) * adv
    kl = None if ref is None else (ref - lp).expm1() - (ref - lp)
    if beta:
        assert kl is not None
        gain = gain - beta * kl
    unknown = torch.full_like(lp, torch.nan)
    terms = (
        torch.ones_like(lp), scale, ratio, log_ratio, clipped, unknown if kl is None else kl,
        unknown if entropy is None else entropy, ~lp.isfinite(),
    )  # fmt: skip
    maxima = (ratio, log_ratio.abs())
    stats = [torch.where(trained, x.detach().double(), 0.0).sum() for x in terms]
    stats += [torch.cat([torch.where(trained, x.detach().double(), 0.0), scale.new_zeros(1)]).amax() for x in maxima]
    kept = torch.where(trained, _wide(logprob.detach()), torch.nan)
    return PolicyLoss(-(scale * gain).sum(), kept, torch.stack(stats))


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
    """`policy_loss` of `linear_logprob`; only the trained rows are multiplied by the head."""
    rows = trained_rows(advantage, token_weight, beta).nonzero().squeeze(-1)
    some = linear_logprob(
        hidden[rows], weight, targets[rows], bias=bias, temperature=temperature, softcap=softcap, return_entropy=True
    )
    logprob, entropy = (x.new_full(targets.shape, torch.nan).index_copy(0, rows, x) for x in some)
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
    """[B] the score s = log p(Yes) in nats, in float32 (docs/method.md, 1).

    normalization: p is over the vocabulary ("vocab", as in the papers) or over both labels ("yes_no"). With
    `return_mass` also p(Yes) + p(No) over the vocabulary [B], detached.
    """
    logits = logits_of(_wide(hidden), weight, bias, softcap=softcap)
    logp = logits.log_softmax(-1)
    score = logp[:, yes_id] if normalization == "vocab" else F.logsigmoid(logits[:, yes_id] - logits[:, no_id])
    return (score, logp[:, [yes_id, no_id]].detach().exp().sum(-1)) if return_mass else score


def preference_weights(
    likelihood: Callable[[Tensor], Tensor], scores: Tensor, valid: Tensor | None = None
) -> PreferenceWeights:
    """c_k = -df/dL_k and w_k = softmax_i s_ki, at the marginals L_k = logmeanexp_i s_ki (docs/method.md, 2.1).

    f = `likelihood` is differentiable, [P, K] -> [P]. scores: s [P, K, N]. `valid` [P, K, N] bool excludes thoughts
    from the mean and the softmax. A response without any valid thought has weights 0 and L = 0.
    """
    scores = _wide(scores.detach())
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    masked = scores.masked_fill(~valid, -torch.inf)
    some = valid.any(-1)
    masked = torch.where(some[..., None], masked, torch.zeros_like(masked))
    count = torch.where(some, valid.sum(-1), valid.shape[-1])
    marginals = masked.logsumexp(-1) - count.to(masked).log()
    weights = masked.softmax(-1) * valid
    with torch.enable_grad():
        leaf = marginals.requires_grad_()
        losses = likelihood(leaf)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return PreferenceWeights(-gradient, weights, leaf.detach(), losses.detach())


def dual_weights(scores_chosen: Tensor, scores_rejected: Tensor) -> DualWeights:
    """m = sigmoid(L^- - L^+), L = logmeanexp_i s_i, and softmax_i s_i of each side (DWRL Eq. 12). Scores: [B, N]."""
    chosen, rejected = _wide(scores_chosen.detach()), _wide(scores_rejected.detach())
    log_n = torch.tensor([chosen.shape[-1], rejected.shape[-1]], dtype=chosen.dtype, device=chosen.device).log()
    gap = (rejected.logsumexp(-1) - log_n[1]) - (chosen.logsumexp(-1) - log_n[0])
    return DualWeights(gap.sigmoid(), chosen.softmax(-1), rejected.softmax(-1))


class Plan(Protocol):
    """A tree of U tokens, as M nodes in depth-first order. The path of a token consists of the tokens of its node's
    ancestors, and of its own node up to itself.
    """

    @property
    def start(self) -> Tensor:
        """[M] int64: node m holds the tokens [start[m], stop[m])."""

    @property
    def stop(self) -> Tensor:
        """[M] int64: stop[m] is start[m + 1]."""

    @property
    def parent(self) -> Tensor:
        """[M] int64: the parent node, -1 for a root."""


def tree_mask(plan: Plan, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """[U, U] bool: whether the query of the row attends to the key of the column, which is on its path.

    With a window, only keys less than `window` tokens back on the path. The mask is created on `device`, by default
    that of the plan.
    """
    device = plan.start.device if device is None else device
    start, sizes = plan.start.to(device), (plan.stop - plan.start).to(device)
    above = torch.zeros(len(sizes), len(sizes), dtype=torch.bool)  # [node, ancestor]
    for node, up in enumerate(plan.parent.tolist()):
        if up >= 0:
            above[node] = above[up]
            above[node, up] = True
    above = above.to(device)
    nodes = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    token = torch.arange(len(nodes), device=device)
    own = (nodes[:, None] == nodes) & (token[:, None] >= token)
    mask = above[nodes][:, nodes] | own
    if window is not None:
        position = token - start[nodes] + (above * sizes).sum(-1)[nodes]
        mask &= position[:, None] - position < window
    return mask


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """q [U, Hq, D], k and v [U, Hkv, D] -> [U, Hq, D]: softmax(cap(scale q k)) v over the keys of `tree_mask`.

    cap(x) = softcap tanh(x / softcap). scale is D ** -0.5 by default. Query head h reads key head h // (Hq / Hkv).
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    logits = _wide(q.transpose(0, 1) @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = tree_mask(plan, window, q.device)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(0, 1)


class CacheStep(NamedTuple):
    """Q new tokens of texts whose beginnings are in a cache with blocks of `BLOCK` tokens, and what they attend to.

    position: [Q] int64, the position of each token in its text. slot: [Q] int64, block * BLOCK + offset, where its key
    and value are stored; -1: not stored. tiles: [T, 5] int64, each row (block, position, count, start, stop) is a piece
    of the cache: the first `count` tokens of `block`, the first of them at `position` of the text, visible to the new
    tokens [start, stop) at that position or later. New tokens see one another through their stored keys and values.
    """

    position: Tensor
    slot: Tensor
    tiles: Tensor


def cache_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    step: CacheStep,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """q [Q, Hq, D], k and v [Q, Hkv, D] -> [Q, Hq, D]: k and v are stored in the cache, then softmax(cap(scale q k)) v.

    keys: [blocks, Hkv, D, BLOCK]. values: [blocks, Hkv, BLOCK, Dv], Dv >= D. Both are changed in place. cap, scale and
    heads are those of `tree_attention`. A token that sees nothing gets 0.
    """
    dim, group, size = q.shape[2], q.shape[1] // k.shape[1], keys.shape[3]
    kept = step.slot >= 0
    block, place = (step.slot[kept] // size), (step.slot[kept] % size)
    keys[block, :, :, place] = k[kept]
    values[block, :, place, :dim] = v[kept]
    block, first, count, start, stop = step.tiles.unbind(1)
    where = torch.arange(size, device=q.device)
    place = first[:, None] + where  # [T, size], like the following tensors until they are flattened
    there = (where < count[:, None]).flatten()
    k = keys[block].permute(0, 3, 1, 2).flatten(0, 1)[there].repeat_interleave(group, dim=1).transpose(0, 1)
    v = values[block, :, :, :dim].transpose(1, 2).flatten(0, 1)[there].repeat_interleave(group, dim=1).transpose(0, 1)
    start, stop, place = (x.expand(len(count), size).flatten()[there] for x in (start[:, None], stop[:, None], place))
    token, position = torch.arange(len(q), device=q.device)[:, None], step.position[:, None]
    mask = (start <= token) & (token < stop) & (place <= position)
    if window is not None:
        mask &= position - place < window
    logits = _wide(q.transpose(0, 1) @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)
    return (weights.to(v.dtype) @ v).transpose(0, 1)


def gumbel_pick(logprob: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """[R]: the argmax of logprob [R, V] + (-log(-log1p(-w))), w uniform in (0, 1) from `philox`.

    w is (bits + 1/2) 2^-32, at most 1 - 2^-24. Near 0, where a rare token wins, float32 represents it exactly.
    """
    count = logprob.shape[1]
    low = torch.arange(-(-count // 4), device=keys.device)
    bits = torch.stack(philox(keys[:, None], low[None], positions[:, None]), -1).flatten(1)[:, :count]
    w = (bits.float() * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24)
    return (logprob - (-torch.log1p(-w)).log()).argmax(-1)


def philox(keys: Tensor, low: Tensor, high: Tensor | int) -> tuple[Tensor, ...]:
    """Four words of 32 bits, int64: Philox 4x32-10 (Salmon et al., 2011) of the counter (low, high, 0, 0).

    keys: int64, their 64 bits. low, high: int64, 0 to 2^32 - 1. They broadcast. The result equals that of
    `triton.language.randint4x`.
    """
    mask = 2**32 - 1
    k0, k1 = keys & mask, (keys >> 32) & mask
    zero = torch.zeros_like(low + keys)
    c0, c1, c2, c3 = zero + low, zero + high, zero, zero
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits; the sign has no meaning
        c0, c1, c2, c3 = ((b >> 32) & mask) ^ c1 ^ k0, b & mask, ((a >> 32) & mask) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
