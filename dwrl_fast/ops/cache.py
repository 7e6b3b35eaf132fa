"""Attention of new tokens to a cache that stores every shared prefix of several texts once."""

import torch
from torch import Tensor

from dwrl_fast.errors import UserError
from dwrl_fast.ops import extension, oracle
from dwrl_fast.ops.attention import check_attention, check_channels
from dwrl_fast.ops.backend import autocast, choose_backend
from dwrl_fast.ops.oracle import CacheStep

BLOCK = 64  # tokens


def cache_shapes(heads: int, channels: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """One block of keys, [Hkv, D, BLOCK], and of values, [Hkv, BLOCK, Dv]: keys are transposed, and rows of values are
    padded to whole vectors of every instruction set.
    """
    return (heads, channels, BLOCK), (heads, BLOCK, -(-channels // 16) * 16)


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
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """[Q, Hq, D]: k and v of new tokens are stored in the cache, then every new token attends as `step` defines.

    q: [Q, Hq, D]. k, v: [Q, Hkv, D]. keys, values: `cache_shapes` for each block, of the same dtype, changed in place.
    Dtypes, heads, scale, softcap, window (tokens back in the text) and sinks are as in `tree_attention`. One call can
    decode, continue a text by several tokens, and prefill. There is no gradient. Sums are in float32 (float64 for
    float64), and their order depends only on `step`.

    Raises UserError, which names the argument, and on the CPU ValueError for a step that points outside the cache.
    """
    name = "cache_attention"
    q, k, v = autocast(q), autocast(k), autocast(v)
    check_attention(name, q, k, v, softcap, window, sinks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UserError(f"{name}: a cache takes no gradient; call it under torch.no_grad(), or use tree_attention")
    for label, x, shape in zip(("keys", "values"), (keys, values), cache_shapes(k.shape[1], k.shape[2]), strict=True):
        if x.shape[1:] != shape or x.dtype != q.dtype or x.device != q.device or not x.is_contiguous():
            raise UserError(
                f"{name}: {label} is {x.dtype} {list(x.shape)} on {x.device}; expected contiguous {q.dtype} [blocks, "
                f"{', '.join(map(str, shape))}] on {q.device}"
            )
    if len(keys) != len(values):
        raise UserError(f"{name}: values has {len(values)} blocks, keys {len(keys)}")
    of_step = [len(q)], [len(q)], [*step.tiles.shape[:1], 5]
    for label, x, sizes in zip(step._fields, step, of_step, strict=True):
        if list(x.shape) != sizes or x.dtype != torch.int64 or not x.is_contiguous():
            raise UserError(f"{name}: step.{label} is {x.dtype} {list(x.shape)}; expected contiguous int64 {sizes}")
    chosen = choose_backend(backend, name, q)
    if chosen == "reference":
        return oracle.cache_attention(q, k, v, keys, values, step, scale=scale, softcap=softcap, window=window)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    if chosen == "triton":
        return _blocked(q, k, v, keys, values, step, scale, softcap, window)
    found: Tensor = torch.ops.dwrl_fast.cache_attention_(q, k, v, keys, values, *step, scale, softcap, window)
    return found


@torch.compiler.disable
def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    step: CacheStep,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """The Triton implementation. It does not wait for the device. A step on the CPU is copied to the device."""
    from dwrl_fast.kernels import cache

    check_channels("cache_attention", q)
    if len(q) == 0:
        return q.new_empty(q.shape)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    there = (x.to(q.device, non_blocking=True) for x in step)
    return cache.attend(q, k, v, keys, values, *there, cache.sizes(q.dtype, q.shape[2]), scale, softcap, window)


if extension.problem() is None:
    torch.library.register_fake("dwrl_fast::cache_attention_", lambda q, *rest: q.new_empty(q.shape))
