"""Attention over a tree of tokens in which a shared prefix is stored once: each token attends to its path."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwrl_fast.errors import UserError
from dwrl_fast.log import info_once, warn_once
from dwrl_fast.ops import extension, oracle
from dwrl_fast.ops.backend import autocast, choose_backend
from dwrl_fast.ops.oracle import Plan
from dwrl_fast.ops.paths import varlen_tree_attention
from dwrl_fast.ops.products import wide
from dwrl_fast.ops.tiles import forest
from dwrl_fast.ops.varlen import VARLEN, VarlenOptions

BACKENDS = ("auto", "reference", "cpu", "triton", *VARLEN)


MOST_CHANNELS = 256  # of a head: more do not fit the shared memory of a multiprocessor


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
    key head h // (Hq / Hkv). scale is D ** -0.5 by default. softcap makes the logits softcap * tanh(logits / softcap).
    window leaves only the keys less than that many tokens back along the path. sinks must be None.

    On the CPU this is FlashAttention (arXiv 2205.14135): an online softmax, and a backward pass from the saved out and
    log-sum-exp. No matrix of [U, U] ever exists. Sums are in float32 (float64 for float64), and their order follows
    from the plan alone, whatever the number of threads. On CUDA in bfloat16 the kernels of `ops.varlen` do the same:
    backend "flash_attn" or "varlen"; "auto" takes the first that can run.

    Raises UserError, which names the argument, and ValueError for a plan that is no depth-first cover of the U tokens.
    """
    q, k, v = autocast(q), autocast(k), autocast(v)
    _check(q, k, v, softcap, window, sinks)
    chosen = _able(backend, q.device, q.dtype, q.shape[-1], softcap)
    if chosen not in VARLEN:
        chosen = choose_backend(chosen, "tree_attention", q)
    if chosen == "reference" or (chosen != "cpu" and len(q) == 0):
        return oracle.tree_attention(q, k, v, plan, scale=scale, softcap=softcap, window=window)
    options = VarlenOptions(
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        None if softcap is None else float(softcap),
        window,
    )
    if chosen in VARLEN:
        return varlen_tree_attention(q, k, v, plan, VARLEN[chosen], options)
    if chosen == "triton":
        if q.shape[2] > MOST_CHANNELS:
            raise UserError(
                f"tree_attention: heads have {q.shape[2]} channels; backend 'triton' takes {MOST_CHANNELS} at most "
                "(backend='reference' takes any number)"
            )
        return tiled_attention(q, k, v, plan, options)
    nodes = plan.start.contiguous(), plan.stop.contiguous(), plan.parent.contiguous()
    return torch.ops.dwrl_fast.tree_attention(q, k, v, *nodes, *options)[0]


@torch.compiler.assume_constant_result  # decided while tracing
def _able(backend: str, device: torch.device, dtype: torch.dtype, channels: int, softcap: float | None) -> str:
    """The backend as named; for "auto" off the CPU, the first of VARLEN that can run, else the definition."""
    if backend not in BACKENDS:
        raise UserError(f"tree_attention: backend is {backend!r}; it can be {', '.join(BACKENDS)}")
    if backend in VARLEN:
        problem = VARLEN[backend].problem(device, dtype, channels, softcap)
        if problem:
            raise UserError(f"tree_attention: backend {backend!r} cannot run: {problem}")
    if backend != "auto" or device.type == "cpu" or dtype != torch.float64:
        return backend
    problems: list[str] = []
    for name, varlen in VARLEN.items():
        problem = varlen.problem(device, dtype, channels, softcap)
        if problem is None:
            reason = f" ({'; '.join(problems)})" if problems else ""
            info_once(f"tree_attention on {device.type} in {dtype}: backend {name}{reason}")
            return name
        problems.append(f"{name} cannot run: {problem}")
    warn_once(
        f"tree_attention on {device.type} in {dtype}: backend reference, whose time and memory grow with the square of "
        f"the tokens ({'; '.join(problems)})"
    )
    return "reference"


def _check(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, window: int | None, sinks: Tensor | None) -> None:
    name = "tree_attention"
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


@torch.compiler.disable
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: VarlenOptions) -> Tensor:
    """`tree_attention` by the Triton kernels: [U, Hq, D], differentiable once. U must be above 0."""
    if options.window is not None and options.window >= forest(plan, len(q)).longest_path:
        options = options._replace(window=None)
    out: Tensor = _Tiled.apply(q, k, v, plan, options)
    return out


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: VarlenOptions) -> Tensor:
        from dwrl_fast.kernels import attention

        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        blocks = attention.sizes(q.dtype, q.shape[2])
        queries = forest(plan, len(q)).queries(blocks.forward.queries, options.window, q.device)
        out, lse = attention.attend(q, k, v, queries, options, blocks.forward)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = plan, options, blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from dwrl_fast.kernels import attention

        plan, options, blocks = ctx.how
        tiles, where = forest(plan, len(grad)), grad.device
        queries = tiles.queries(blocks.to_queries.queries, options.window, where)
        keys = tiles.keys(blocks.to_keys.keys, where)
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        dq, dk, dv = attention.attend_backward(
            grad, *ctx.saved_tensors, queries, keys, options, blocks.to_keys, blocks.to_queries
        )
        return dq, dk, dv, None, None


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
