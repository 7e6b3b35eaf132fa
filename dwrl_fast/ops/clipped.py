"""The clipped policy loss (DWRL Eq. 14), from hidden states or from log-probabilities.

The forward pass also computes the gradients, while a chunk's logits are in memory. The backward pass only scales them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dwrl_fast.errors import UserError
from dwrl_fast.ops import oracle
from dwrl_fast.ops.backend import (
    autocast,
    check_head,
    check_scaling,
    check_targets,
    check_tokens,
    choose_backend,
    row_pass,
    without_autocast,
)
from dwrl_fast.ops.oracle import PolicyLoss, trained_rows
from dwrl_fast.ops.products import Products, empty_gradients, needs_gradient, wide
from dwrl_fast.ops.stats import empty_stats


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
    """`policy_loss` of the log-probabilities of a linear head (DWRL Eq. 14). The logits [T, V] are never stored.

    hidden: [T, H], float32, bfloat16 or float64. weight: [V, H], of hidden's dtype or a float32 master. bias: [V].
    targets: [T] int64. old_logprob, advantage, token_weight, ref_logprob: [T], constants, as in `policy_loss`. The
    logits are softcap tanh(x / softcap) / temperature, x the head's output. hidden, weight and bias are differentiated.

    The cost is three matrix products over the trained rows. Rows with token_weight 0, or with advantage 0 if beta is 0,
    are in no product and may hold anything. Rows whose gradient is 0 because of the clip (beta 0) are in one product.
    Put constant factors of the loss into token_weight: on the CPU, scaling the loss afterwards costs one more pass over
    the gradients. On CUDA that pass always happens, because it also rounds dWeight.

    Returns PolicyLoss(loss, logprob, stats), see `policy_loss`. Raises UserError, which names the argument. On CUDA a
    target outside the vocabulary does not raise: its row is NaN and counts as `invalid` in stats. On CUDA the host
    waits once for the number of trained rows, and once per block of some thousand rows for the rows with a gradient.
    """
    name = "linear_policy_loss"
    hidden = autocast(hidden)
    check_head(name, hidden, weight, bias)
    check_scaling(name, temperature, softcap)
    check_tokens(
        name, hidden, targets=targets, old_logprob=old_logprob, advantage=advantage, token_weight=token_weight,
        ref_logprob=ref_logprob,
    )  # fmt: skip
    _check_rule(name, clip_low, clip_high, ref_logprob, beta)
    chosen = choose_backend(backend, name, hidden)
    if chosen == "reference":
        return without_autocast(oracle.linear_policy_loss)(
            hidden, weight, targets, old_logprob, advantage, token_weight, clip_low=clip_low, clip_high=clip_high,
            temperature=temperature, softcap=softcap, bias=bias, ref_logprob=ref_logprob, beta=beta,
        )  # fmt: skip
    inputs = (hidden, weight, bias)
    needs = needs_gradient(*inputs)
    tokens = (_constant(x, wide(hidden.dtype)) for x in (old_logprob, advantage, token_weight, ref_logprob))
    loss, logprob, stats, *gradients = _linear_policy_loss(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(), targets.contiguous(), *tokens,
        float(clip_low), float(clip_high), float(beta), float(temperature), softcap, *needs, chosen,
    )  # fmt: skip
    return PolicyLoss(_with_gradients(loss, inputs, gradients, needs), logprob, stats)


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
    backend: str = "auto",
) -> PolicyLoss:
    """-sum_t token_weight_t [min(g_t A_t, clip(g_t, 1 - clip_low, 1 + clip_high) A_t) - beta KL_t] (DWRL Eq. 14).

    g_t = exp(logprob_t - old_logprob_t). KL_t = exp(d) - d - 1, d = ref_logprob_t - logprob_t, estimates the KL
    divergence to a reference policy (DeepSeekMath, arXiv 2402.03300, Eq. 4). The methods of this package use beta 0;
    the term is for other trainers. With ref_logprob and beta 0 the KL is only counted in stats.

    All arguments are [T], log-probabilities in nats, logprob in float32 or float64. Only logprob is differentiated.
    entropy is only counted in stats. Rows with token_weight 0, or with advantage 0 if beta is 0, are left out and may
    hold anything.

    Returns PolicyLoss(loss, logprob, stats): a scalar; logprob [T], detached, NaN for rows that are left out; and the
    stats that `dwrl_fast.ops.stats` describes. Raises UserError, which names the argument.
    """
    name = "policy_loss"
    if logprob.dim() != 1 or logprob.dtype not in (torch.float32, torch.float64):
        raise UserError(f"{name}: logprob is {logprob.dtype} {list(logprob.shape)}; expected float32 or float64 [T]")
    check_tokens(
        name,
        logprob,
        old_logprob=old_logprob,
        advantage=advantage,
        token_weight=token_weight,
        ref_logprob=ref_logprob,
        entropy=entropy,
    )
    _check_rule(name, clip_low, clip_high, ref_logprob, beta)
    chosen = choose_backend(backend, name, logprob)
    if chosen == "reference":
        return oracle.policy_loss(
            logprob, old_logprob, advantage, token_weight, clip_low=clip_low, clip_high=clip_high,
            ref_logprob=ref_logprob, beta=beta, entropy=entropy,
        )  # fmt: skip
    tokens = (logprob, old_logprob, advantage, token_weight, ref_logprob, entropy)
    loss, kept, gradient, stats = _policy_loss(
        *(_constant(x, logprob.dtype) for x in tokens), float(clip_low), float(clip_high), float(beta), chosen
    )
    needs = (torch.is_grad_enabled() and logprob.requires_grad,)
    return PolicyLoss(_with_gradients(loss, (logprob,), [gradient], needs), kept, stats)


def _check_rule(operator: str, clip_low: float, clip_high: float, ref_logprob: Tensor | None, beta: float) -> None:
    if not 0 <= clip_low < math.inf:
        raise UserError(f"{operator}: clip_low is {clip_low}; it must be finite, and 0 or above")
    if not clip_high >= 0:
        raise UserError(f"{operator}: clip_high is {clip_high}; it must be 0 or above")
    if not 0 <= beta < math.inf:
        raise UserError(f"{operator}: beta is {beta}; it must be finite, and 0 or above")
    if beta and ref_logprob is None:
        raise UserError(f"{operator}: beta is {beta}, and the KL term needs ref_logprob [T]; give it, or beta=0")


def _constant(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous()


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated. Without this class a second differentiation would silently give zero;
    with it, it raises.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> Tensor:
        raise RuntimeError("the policy losses of dwrl_fast are differentiable once; with backend='reference', twice")


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale, with an unrounded scale and a single rounding; in one pass if the gradient is still in a wide
    dtype (on CUDA).
    """
    if gradient.dtype == dtype or torch.compiler.is_compiling():
        return (gradient * scale).to(dtype)
    from dwrl_fast.kernels.scaled import scaled

    return scaled(gradient, scale.float(), dtype)


class _Formed(torch.autograd.Function):
    """A loss with precomputed gradients. Arguments: the loss, the inputs, and one gradient per input."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        half = len(ctx.saved_tensors) // 2
        inputs, gradients = ctx.saved_tensors[:half], list(ctx.saved_tensors[half:])
        scale = outer[0].detach()
        eager = not torch.compiler.is_compiling()
        # Read on the host only if that does not wait for a device. An unscaled loss then needs no pass over dWeight.
        if not (eager and scale.device.type == "cpu" and scale.item() == 1):
            gradients = [_scaled(g, scale, x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        if eager and torch.is_grad_enabled():  # create_graph=True; compiled graphs refuse it already
            gradients = [_Once.apply(g, *inputs) for g in gradients]
        return None, *gradients, *(None for _ in gradients)


def _with_gradients(
    loss: Tensor, inputs: tuple[Tensor | None, ...], gradients: list[Tensor], needs: tuple[bool, ...]
) -> Tensor:
    used = [(x, g) for x, g, need in zip(inputs, gradients, needs, strict=True) if need]
    if not used:
        return loss
    return _Formed.apply(loss, *(x for x, _ in used), *(g for _, g in used))


@torch.library.custom_op("dwrl_fast::policy_loss", mutates_args=())
def _policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    ref_logprob: Tensor | None,
    entropy: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, logprob, dLoss/dlogprob and stats. It has no autograd formula, so differentiating it raises."""
    return row_pass(backend).policy_loss_rows(
        logprob, old_logprob, advantage, token_weight, ref_logprob, entropy, clip_low, clip_high, beta
    )


@_policy_loss.register_fake
def _(logprob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return logprob.new_empty(()), torch.empty_like(logprob), torch.empty_like(logprob), empty_stats(logprob)


@torch.library.custom_op("dwrl_fast::linear_policy_loss", mutates_args=())
@without_autocast
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    ref_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, logprob, stats, dHidden, dWeight, dBias (empty if not needed). Differentiating through it raises."""
    rows = row_pass(backend)
    rule = (clip_low, clip_high, beta)
    tokens = (targets, old_logprob, advantage, token_weight, ref_logprob)
    products = Products(hidden, weight, bias, (need_hidden, need_weight, need_bias))
    logprob, entropy = old_logprob.new_full((2, hidden.shape[0]), torch.nan)
    trained = trained_rows(advantage, token_weight, beta).nonzero().squeeze(-1)
    check_targets("linear_policy_loss", targets[trained], weight.shape[0])
    for index in products.split(trained):
        some, coefficient = hidden[index], logprob.new_empty(len(index))
        for part, logits, gradient in products.chunks(some):
            here = index[part]
            taken = (None if x is None else x[here] for x in tokens)
            logprob[here], entropy[here], coefficient[part] = rows.policy_rows(
                logits, gradient, *taken, *rule, temperature, softcap
            )
        if any(products.needs):
            products.backward(some, index, coefficient != 0)
    loss, logprob, _, stats = rows.policy_loss_rows(
        logprob, old_logprob, advantage, token_weight, ref_logprob, entropy, *rule
    )
    return loss, logprob, stats, *products.gradients(wide_weight=True)


@_linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, old: Tensor, *rest: Any) -> tuple:
    gradients = empty_gradients(hidden, weight, bias, rest[-4:-1], wide_weight=True)
    return old.new_empty(()), torch.empty_like(old), empty_stats(old), *gradients
