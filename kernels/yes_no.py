"""log p(Yes) of two labels in one launch: the products of both head rows with the hidden state, logsigmoid, and its
derivatives.

One program processes one hidden state; sums are in float32 for every dtype. The backward pass has two columns and is
plain PyTorch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from dwrl_fast.kernels.rows import _capped
from torch import Tensor

BLOCK = 1024


@triton.jit
def yes_no_kernel(
    hidden, weight_yes, weight_no, bias_yes, bias_no, score, slopes, cap, H: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: writes `score` [B], and `slopes` [B, 2], its derivatives with respect to both labels' head outputs."""
    b = tl.program_id(0).to(tl.int64)
    dot_yes = tl.zeros([BLOCK], tl.float32)
    dot_no = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < H
        h = tl.load(hidden + b * H + j, mask=inside, other=0.0).to(tl.float32)
        dot_yes += h * tl.load(weight_yes + j, mask=inside, other=0.0).to(tl.float32)
        dot_no += h * tl.load(weight_no + j, mask=inside, other=0.0).to(tl.float32)
    yes = tl.sum(dot_yes, 0)
    no = tl.sum(dot_no, 0)
    if HAS_BIAS:
        yes += tl.load(bias_yes).to(tl.float32)
        no += tl.load(bias_no).to(tl.float32)
    slope_yes = 1.0
    slope_no = 1.0
    if HAS_CAP:
        yes = _capped(yes, cap, HAS_CAP)
        no = _capped(no, cap, HAS_CAP)
        slope_yes = 1 - (yes / cap) * (yes / cap)
        slope_no = 1 - (no / cap) * (no / cap)
    d = yes - no
    decay = tl.exp(-tl.abs(d))
    tl.store(score + b, tl.minimum(d, 0.0) - _log1p(decay))
    wrong = tl.where(d < 0, 1 / (1 + decay), decay / (1 + decay))  # sigmoid(-d), which never cancels
    tl.store(slopes + 2 * b, wrong * slope_yes)
    tl.store(slopes + 2 * b + 1, -wrong * slope_no)


@triton.jit
def _log1p(x):
    # For x in [0, 1]: the ratio x / ((1 + x) - 1) corrects the rounding of 1 + x (Kahan).
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1.0, y - 1)))


@torch.library.custom_op("dwrl_fast::yes_no_scores", mutates_args=())
def _scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, yes_id: int, no_id: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    hidden = hidden.contiguous()
    rows = weight[yes_id].contiguous(), weight[no_id].contiguous()
    biases = (None, None) if bias is None else (bias[yes_id], bias[no_id])
    b, h = hidden.shape
    score = hidden.new_empty(b, dtype=torch.float32)
    slopes = hidden.new_empty((b, 2), dtype=torch.float32)
    if b:
        with torch.cuda.device_of(hidden):
            yes_no_kernel[(b,)](
                hidden, *rows, *biases, score, slopes, softcap or 1.0, H=h, HAS_CAP=softcap is not None,
                HAS_BIAS=bias is not None, BLOCK=min(BLOCK, triton.next_power_of_2(h)),
            )  # fmt: skip
    return score, slopes


@_scores.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    score = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return score, hidden.new_empty((hidden.shape[0], 2), dtype=torch.float32)


@torch.library.custom_op("dwrl_fast::yes_no_scores_backward", mutates_args=())
def _scores_backward(
    grad: Tensor, slopes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, yes_id: int, no_id: int,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients, empty if not needed. It has no autograd formula, so a double backward raises."""
    g = grad[:, None] * slopes
    d_hidden, d_weight, d_bias = hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):  # both products in float32
        if need_hidden:
            d_hidden = (g @ torch.stack([weight[yes_id], weight[no_id]]).float()).to(hidden.dtype)
        if need_weight:
            d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            d_weight[yes_id], d_weight[no_id] = g.t() @ hidden.float()
    if need_bias and bias is not None:
        d_bias = torch.zeros_like(bias)
        d_bias[yes_id], d_bias[no_id] = g.sum(0)
    return d_hidden, d_weight, d_bias


@_scores_backward.register_fake
def _(grad: Tensor, slopes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if need and x is not None
        else torch.empty(0, dtype=hidden.dtype, device=hidden.device)
        for x, need in zip((hidden, weight, bias), rest[2:], strict=True)
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, *labels, _ = inputs
    ctx.save_for_backward(output[1], hidden, weight, bias)
    ctx.mark_non_differentiable(output[1])
    ctx.labels = labels


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    needs = ctx.needs_input_grad[:3]
    gradients = _scores_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.labels, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


_scores.register_autograd(_backward, setup_context=_save)


def yes_no_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, yes_id: int, no_id: int, softcap: float | None
) -> Tensor:
    """[B] float32: logsigmoid(logit[yes] - logit[no]), differentiable once.

    hidden: [B, H]. weight: [V, H]. bias: [V].
    """
    return _scores(hidden, weight, bias, yes_id, no_id, softcap)[0]
