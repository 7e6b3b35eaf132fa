"""Log-probabilities from a linear head: of given targets, and of the label "Yes"."""

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

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
from dwrl_fast.ops.products import Products, empty_gradients, wide


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., temperature: float = ...,
    softcap: float | None = ..., return_entropy: Literal[False] = False, backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., temperature: float = ...,
    softcap: float | None = ..., return_entropy: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """[T] log p(target) in nats, and with `return_entropy` the entropy [T] in nats. The logits [T, V] are never stored.

    hidden: [T, H], float32, bfloat16 or float64. weight: [V, H], of hidden's dtype or a float32 master. bias: [V].
    targets: [T] int64. The logits are softcap tanh(x / softcap) / temperature, x the head's output. Results are float32
    (float64 for float64), and differentiable in hidden, weight and bias. The cost is four matrix products: the backward
    pass computes the logits again for rows whose gradient is not 0. Raises UserError, which names the argument. On CUDA
    a target outside the vocabulary gives NaN.
    """
    name = "linear_logprob"
    hidden = autocast(hidden)
    check_head(name, hidden, weight, bias)
    check_scaling(name, temperature, softcap)
    check_tokens(name, hidden, targets=targets)
    chosen = choose_backend(backend, name, hidden)
    if chosen == "reference":
        return without_autocast(oracle.linear_logprob)(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, return_entropy=return_entropy
        )
    logprob, entropy, _ = _linear_logprob(
        hidden, weight, bias, targets.contiguous(), float(temperature), softcap, return_entropy, -1, chosen
    )
    return (logprob, entropy) if return_entropy else logprob


@overload
def yes_no_logprob(
    hidden: Tensor, weight: Tensor, yes_id: int, no_id: int, *, normalization: str = ..., bias: Tensor | None = ...,
    softcap: float | None = ..., return_mass: Literal[False] = False, backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def yes_no_logprob(
    hidden: Tensor, weight: Tensor, yes_id: int, no_id: int, *, normalization: str = ..., bias: Tensor | None = ...,
    softcap: float | None = ..., return_mass: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """[B] the score s = log p(Yes) in nats (docs/method.md, 1), and with `return_mass` p(Yes) + p(No) [B], detached.

    hidden: [B, H]. weight: [V, H]. bias: [V]. yes_id, no_id: token ids of the labels. With normalization "vocab" (as in
    the papers) s is `linear_logprob` of yes_id. With "yes_no" it is logsigmoid(logit[yes] - logit[no]), which reads two
    rows of the weight. The mass is over the vocabulary in both cases, so with "yes_no" it costs a product with the
    whole head, without gradient. Results are float32 also for bfloat16 hidden (float64 for float64); s is
    differentiable in hidden, weight and bias. Raises UserError, which names the argument.
    """
    name = "yes_no_logprob"
    hidden = autocast(hidden)
    check_head(name, hidden, weight, bias)
    check_scaling(name, 1.0, softcap)
    _check_labels(name, yes_id, no_id, weight.shape[0], normalization)
    chosen = choose_backend(backend, name, hidden)
    if chosen == "reference":
        return without_autocast(oracle.yes_no_logprob)(
            hidden, weight, yes_id, no_id, normalization=normalization, bias=bias, softcap=softcap,
            return_mass=return_mass,
        )  # fmt: skip
    if normalization == "yes_no":
        score = _label_scores(hidden, weight, bias, yes_id, no_id, softcap, chosen)
        if not return_mass:
            return score
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        hidden, weight = hidden.float(), weight.float()  # on CUDA the products give float32 directly
    targets = torch.full(hidden.shape[:1], yes_id, device=hidden.device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and normalization == "vocab"):
        yes, _, no = _linear_logprob(
            hidden, weight, bias, targets, 1.0, softcap, False, no_id if return_mass else -1, chosen
        )
    if normalization == "vocab":
        score = yes
    return (score, yes.detach().exp() + no.exp()) if return_mass else score


def _check_labels(operator: str, yes_id: int, no_id: int, vocabulary: int, normalization: str) -> None:
    if normalization not in ("vocab", "yes_no"):
        raise UserError(f"{operator}: normalization is {normalization!r}; it can be 'vocab' or 'yes_no'")
    for argument, token in (("yes_id", yes_id), ("no_id", no_id)):
        if not 0 <= token < vocabulary:
            raise UserError(f"{operator}: {argument} is {token}; expected a row of weight, 0 to {vocabulary - 1}")
    if yes_id == no_id:
        raise UserError(f"{operator}: yes_id and no_id are both {yes_id}; expected two labels")


@torch.library.custom_op("dwrl_fast::linear_logprob", mutates_args=())
@without_autocast
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    beside: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """[T] each: log-probability, entropy, and the log-probability of token `beside` (-1: none), not differentiated.

    `return_entropy` says whether the entropy's gradient will be used.
    """
    rows = row_pass(backend)
    products = Products(hidden, weight, bias, (False, False, False))
    check_targets("linear_logprob", targets, weight.shape[0])
    logprob = hidden.new_empty(hidden.shape[0], dtype=wide(hidden.dtype))
    entropy, other = torch.empty_like(logprob), torch.empty_like(logprob)
    for here, logits, _ in products.chunks(hidden):
        if beside < 0:
            logprob[here], entropy[here] = rows.logprob_rows(logits, targets[here], temperature, softcap)
            continue
        z, z_beside = _logits_of_labels(logits, targets[here], beside, temperature, softcap)
        masked = z == -torch.inf  # it does not determine the normaliser, so the row uses the other label
        known = torch.where(masked, beside, targets[here])
        found, entropy[here] = rows.logprob_rows(logits, known, temperature, softcap)
        logprob[here] = torch.where(masked, found - torch.inf, found)
        other[here] = torch.where(masked, found, found + (z_beside - z))
    return logprob, entropy, other


def _logits_of_labels(
    logits: Tensor, targets: Tensor, beside: int, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """z of the targets and of one token, read before the row functions overwrite the logits."""
    pair = torch.stack([logits.gather(1, targets[:, None]).squeeze(1), logits[:, beside]]).to(wide(logits.dtype))
    if softcap is not None:
        pair = softcap * torch.tanh(pair / softcap)
    return pair[0] / temperature, pair[1] / temperature


@_linear_logprob.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    empty = hidden.new_empty(hidden.shape[0], dtype=wide(hidden.dtype))
    return empty, torch.empty_like(empty), torch.empty_like(empty)


@torch.library.custom_op("dwrl_fast::linear_logprob_backward", mutates_args=())
@without_autocast
def _linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, empty if not needed. It has no autograd formula, so a double backward raises."""
    rows = row_pass(backend)
    products = Products(hidden, weight, bias, (need_hidden, need_weight, need_bias))
    moved = grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
    for index in products.split(moved.nonzero().squeeze(-1)):
        some = hidden[index]
        for part, logits, gradient in products.chunks(some):
            here = index[part]
            grads = grad_logprob[here], None if grad_entropy is None else grad_entropy[here]
            rows.logprob_rows_grad(logits, gradient, targets[here], *grads, temperature, softcap)
        products.backward(some, index, torch.ones_like(index, dtype=torch.bool))
    return products.gradients()


@_linear_logprob_backward.register_fake
def _(grad_logprob: Tensor, grad_entropy: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias = rest[:3]
    return empty_gradients(hidden, weight, bias, rest[-4:-1])


def _save_logprob(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, temperature, softcap, return_entropy, _, backend = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)
    ctx.options = temperature, softcap, backend
    ctx.return_entropy = return_entropy
    ctx.mark_non_differentiable(output[2])


def _backward_logprob(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple:
    temperature, softcap, backend = ctx.options
    needs = ctx.needs_input_grad[:3]
    gradients = _linear_logprob_backward(
        grad_logprob.contiguous(), grad_entropy.contiguous() if ctx.return_entropy else None, *ctx.saved_tensors,
        temperature, softcap, *needs, backend,
    )  # fmt: skip
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 6


_linear_logprob.register_autograd(_backward_logprob, setup_context=_save_logprob)


@without_autocast
def _label_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, yes_id: int, no_id: int, softcap: float | None, backend: str
) -> Tensor:
    """[B] log p(Yes) of the two labels: with only two columns, plain PyTorch with autograd is the fastest way on a
    CPU.
    """
    if backend == "triton":
        from dwrl_fast.kernels.yes_no import yes_no_scores

        return yes_no_scores(hidden, weight, bias, yes_id, no_id, softcap)
    labels = [yes_id, no_id]
    some_bias = None if bias is None else bias[labels]
    logits = oracle.logits_of(hidden.to(wide(hidden.dtype)), weight[labels], some_bias, softcap=softcap)
    return F.logsigmoid(logits[:, 0] - logits[:, 1])
