"""Attention over a tree of tokens in which a shared prefix is stored once: each token attends to its path."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwrl_fast.errors import UserError
from dwrl_fast.ops import extension, oracle
from dwrl_fast.ops.backend import autocast, choose_backend
from dwrl_fast.ops.oracle import Plan
from dwrl_fast.ops.products import wide
from dwrl_fast.ops.tiles import forest

MOST_CHANNELS = 256  # channels of a head in Triton; more do not fit into the shared memory of a multiprocessor


class _Options(NamedTuple):
    """Options in the form that the kernels take."""

    scale: float
    softcap: float | None
    window: int | None


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """[U, Hq, D]: softmax attention of every token to the tokens of its node's ancestors, and of its node up to itself.

    q: [U, Hq, D]. k, v: [U, Hkv, D]. They are float32, bfloat16 or float64. Hq is a multiple of Hkv: query head h reads
    key head h // (Hq / Hkv). scale is D ** -0.5 by default. softcap replaces the logits by softcap * tanh(logits /
    softcap). window keeps only the keys less than that many tokens back on the path. sinks must be None.

    This is FlashAttention (arXiv 2205.14135), in C++ on the CPU and in Triton on CUDA: an online softmax, and a
    backward pass from the saved out and log-sum-exp. No matrix [U, U] is ever stored, and no key is copied. Sums are in
    float32 (float64 for float64). Their order depends only on the plan, not on the number of threads.

    Raises UserError, which names the argument, and ValueError for a plan that is not a depth-first cover of the U
    tokens.
    """
    q, k, v = autocast(q), autocast(k), autocast(v)
    check_attention("tree_attention", q, k, v, softcap, window, sinks)
    chosen = choose_backend(backend, "tree_attention", q)
    if chosen == "reference" or (chosen == "triton" and len(q) == 0):
        return oracle.tree_attention(q, k, v, plan, scale=scale, softcap=softcap, window=window)
    options = _Options(
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        None if softcap is None else float(softcap),
        window,
    )
    if chosen == "triton":
        return _tiled(q, k, v, plan, options)
    nodes = plan.start.contiguous(), plan.stop.contiguous(), plan.parent.contiguous()
    return torch.ops.dwrl_fast.tree_attention(q, k, v, *nodes, *options)[0]


@torch.compiler.disable
def _tiled(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: _Options) -> Tensor:
    """The Triton implementation: differentiable once. U must be above 0."""
    check_channels("tree_attention", q)
    if options.window is not None and options.window >= forest(plan, len(q)).longest_path:
        options = options._replace(window=None)
    out: Tensor = _Tiled.apply(q, k, v, plan, options)
    return out


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: _Options) -> Tensor:
        from dwrl_fast.kernels import attention

        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        blocks = attention.sizes(q.dtype, q.shape[2])
        queries = forest(plan, len(q)).queries(blocks.forward.queries, options.window, q.device)
        out, lse = attention.attend(q, k, v, queries, blocks.forward, *options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = plan, options, blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from dwrl_fast.kernels import attention

        plan, options, blocks = ctx.how
        tiles, where, heads = forest(plan, len(grad)), grad.device, ctx.saved_tensors[1].shape[1]
        queries = tiles.queries(blocks.to_queries.queries, options.window, where)
        keys = tiles.keys(blocks.to_keys.keys, heads, where)
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        found = attention.attend_backward(grad, *ctx.saved_tensors, queries, keys, blocks, *options)
        return *found, None, None


def check_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, softcap: float | None, window: int | None, sinks: Tensor | None
) -> None:
    """Raise UserError unless these are valid arguments of attention."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        advice = ": float16 gradients under- and overflow; use bfloat16" if q.dtype == torch.float16 else ""
        raise UserError(f"{name}: q is {q.dtype}; it can be float32, bfloat16 or float64{advice}")
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise UserError(f"{name}: q is {list(q.shape)}; expected [U, Hq, D] (flatten the batch)")
    for label, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape != (q.shape[0], k.shape[1], q.shape[2]):
            raise UserError(f"{name}: {label} is {list(x.shape)}; expected [U = {q.shape[0]}, Hkv, D = {q.shape[2]}]")
        if x.dtype != q.dtype or x.device != q.device:
            raise UserError(f"{name}: {label} is {x.dtype} on {x.device}; q is {q.dtype} on {q.device}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise UserError(f"{name}: q has {q.shape[1]} heads; expected a multiple of the {k.shape[1]} of k and v")
    if softcap is not None and not softcap > 0:
        raise UserError(f"{name}: softcap is {softcap}; it must be above 0, or None for no soft-cap")
    if window is not None and not window > 0:
        raise UserError(f"{name}: window is {window}; it must be above 0, or None for no window")
    if sinks is not None:
        raise UserError(f"{name}: sinks (attention sinks) are not implemented; use the padded forward for this model")


def check_channels(name: str, q: Tensor) -> None:
    """Raise UserError if a head is too large for the Triton kernels."""
    if q.shape[2] > MOST_CHANNELS:
        raise UserError(
            f"{name}: heads have {q.shape[2]} channels; backend 'triton' takes {MOST_CHANNELS} at most "
            "(backend='reference' takes any number)"
        )


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    return out, q.new_empty(q.shape[:2], dtype=wide(q.dtype))


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, softcap, window = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.options = scale, softcap, window
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.dwrl_fast.tree_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 6


def _twice(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("tree_attention is differentiable once; with backend='reference', twice")


if extension.problem() is None:
    torch.library.register_fake("dwrl_fast::tree_attention", _forward_fake)
    torch.library.register_fake("dwrl_fast::tree_attention_backward", _backward_fake)
    torch.library.register_autograd("dwrl_fast::tree_attention", _backward, setup_context=_save)
    torch.library.register_autograd("dwrl_fast::tree_attention_backward", _twice)
