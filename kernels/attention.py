"""Attention over a tree of tokens in Triton: FlashAttention (arXiv 2205.14135) whose tiles follow `ops/tiles.py`.

Tokens lie in depth-first order, so the query t sees the key u where u <= t < below[u], the place where the subtree of
u's node ends. A tile of queries, some of a node or of several, walks one list of keys: the path of its first token and
itself. Those that all its queries see come first, and need no mask. A tile of keys walks the queries from its first key
to the end of its subtree, which lie side by side, of all query heads that read it: so nothing is copied, and the
gradients of keys that thoughts share are summed where they are formed. Every sum has one order, whatever runs beside.

Shapes: U tokens, Hq query heads, Hkv key heads, D channels; TQ tiles of queries, TK of keys, E entries of all lists.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwrl_fast.kernels.rows import _capped
from dwrl_fast.ops.tiles import KeyTiles, QueryTiles

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
HIDDEN: tl.constexpr = tl.constexpr(-1.0e30)  # where a row's maximum begins: finite, so that no difference is NaN


class Blocks(NamedTuple):
    """Queries and keys of a tile, warps, and stages of the pipeline that loads them."""

    queries: int
    keys: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """Of the three kernels that walk."""

    forward: Blocks
    to_keys: Blocks  # dK and dV
    to_queries: Blocks  # dQ


NARROW = Sizes(Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2), Blocks(128, 64, 8, 2))
WIDE_HEADS = Sizes(Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 1), Blocks(64, 32, 4, 1))  # above 128 channels, or float32


def sizes(dtype: torch.dtype, channels: int) -> Sizes:
    """The tiles for heads of so many channels: what fits the shared memory of one multiprocessor."""
    return NARROW if dtype == torch.bfloat16 and channels <= 128 else WIDE_HEADS


@triton.jit
def _logits(products, scale, cap, HAS_CAP: tl.constexpr):
    """In base 2."""
    if HAS_CAP:
        return _capped(products * scale, cap, HAS_CAP) * LOG2E
    return products * (scale * LOG2E)


@triton.jit
def _rows_of(x, row, stride, channel, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] of one head; 0 beyond its channels, and where MASKED in rows outside `mask`."""
    at = x + row.to(tl.int64)[:, None] * stride + channel[None, :]
    if MASKED:
        return tl.load(at, mask=mask[:, None] & (channel < D)[None, :], other=0.0)
    if D != BLOCK_D:
        return tl.load(at, mask=(channel < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _seen(row, key, inside, below, place, window, HAS_WINDOW: tl.constexpr):
    """[rows, keys]: whether the query of the row sees the key of the column."""
    last = tl.load(below + key, mask=inside, other=0)
    found = (row[:, None] >= key[None, :]) & (row[:, None] < last[None, :])
    if HAS_WINDOW:
        there = tl.load(place + row)
        found &= there[:, None] - tl.load(place + key, mask=inside, other=0)[None, :] < window
    return found


@triton.jit
def _attend(
    total, most, weight, q, k, v, row, low, high, keys, below, place, stride_k, stride_v, scale, cap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the entries [low, high) of `keys`: weighted sum of values, maximum, sum of weights."""
    channel = tl.arange(0, BLOCK_D)
    for start in tl.range(low, high, KEYS):
        entry = start + tl.arange(0, KEYS)
        inside = entry < high
        key = tl.load(keys + entry, mask=inside, other=0) if MASKED else tl.load(keys + entry)
        k_rows = _rows_of(k, key, stride_k, channel, inside, D, BLOCK_D, MASKED)
        z = _logits(tl.dot(q, k_rows.T, input_precision=PRECISION), scale, cap, HAS_CAP)
        if MASKED:
            z = tl.where(_seen(row, key, inside, below, place, window, HAS_WINDOW), z, -float("inf"))
        higher = tl.maximum(most, tl.max(z, 1))
        fade = tl.exp2(most - higher)
        p = tl.exp2(z - higher[:, None])
        weight = weight * fade + tl.sum(p, 1)
        v_rows = _rows_of(v, key, stride_v, channel, inside, D, BLOCK_D, MASKED)
        total = tl.dot(p.to(v_rows.dtype), v_rows, total * fade[:, None], input_precision=PRECISION)
        most = higher
    return total, most, weight


@triton.jit(do_not_specialize=["U", "window"])
def attend_kernel(
    q, k, v, out, lse, order, bounds, shared, keys, below, place, U, stride_q, head_q, stride_k, head_k, stride_v,
    head_v, scale, cap, window, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: out [U, Hq, D], and lse [Hq, U] in base 2."""
    tile, head = tl.load(order + tl.program_id(0)), tl.program_id(1)
    row, channel = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, BLOCK_D)
    given = row < U
    q_rows = _rows_of(q + head * head_q, row, stride_q, channel, given, D, BLOCK_D, True)
    row = tl.where(given, row, 0)  # sees no entry of a list but the first, and is not stored
    k += (head // GROUP) * head_k
    v += (head // GROUP) * head_v
    low, high = tl.load(bounds + tile), tl.load(bounds + tile + 1)
    middle = low + tl.load(shared + tile) // KEYS * KEYS
    total = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    most = tl.full([QUERIES], HIDDEN, tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    total, most, weight = _attend(
        total, most, weight, q_rows, k, v, row, low, middle, keys, below, place, stride_k, stride_v, scale, cap, window,
        D, BLOCK_D, KEYS, HAS_CAP, HAS_WINDOW, False, PRECISION,
    )  # fmt: skip
    total, most, weight = _attend(
        total, most, weight, q_rows, k, v, row, middle, high, keys, below, place, stride_k, stride_v, scale, cap,
        window, D, BLOCK_D, KEYS, HAS_CAP, HAS_WINDOW, True, PRECISION,
    )  # fmt: skip
    row = tile * QUERIES + tl.arange(0, QUERIES)
    at = out + (row.to(tl.int64)[:, None] * HEADS + head) * D + channel[None, :]
    weight = tl.where(given, weight, 1.0)
    tl.store(at, (total / weight[:, None]).to(out.dtype.element_ty), mask=given[:, None] & (channel < D)[None, :])
    tl.store(lse + head.to(tl.int64) * U + row, most + tl.log2(weight), mask=given)


@triton.jit(do_not_specialize=["U"])
def dot_out_kernel(
    grad, out, found, U, stride_g, head_g, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """found [Hq, U]: the dot product of out [U, Hq, D] and its gradient."""
    row, channel, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.program_id(1)
    given = row < U
    g = _rows_of(grad + head * head_g, row, stride_g, channel, given, D, BLOCK_D, True).to(tl.float32)
    o = _rows_of(out + head * D, row, HEADS * D, channel, given, D, BLOCK_D, True).to(tl.float32)
    tl.store(found + head.to(tl.int64) * U + row, tl.sum(g * o, 1), mask=given)


@triton.jit
def _slope(z, cap, HAS_CAP: tl.constexpr):
    """d(capped logit) / d(logit), of the capped logit in base 2."""
    if HAS_CAP:
        u = z / (cap * LOG2E)
        return 1 - u * u
    return 1.0


@triton.jit(do_not_specialize=["U", "window"])
def to_keys_kernel(
    q, k, v, grad, lse, dots, dk, dv, order, ends, below, place, U, stride_q, head_q, stride_k, head_k, stride_v,
    head_v, stride_g, head_g, scale, cap, window, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head: dk and dv [U, Hkv, D], over all queries of the heads that read it."""
    tile, head = tl.load(order + tl.program_id(0)), tl.program_id(1)
    first = tile * KEYS
    key, channel = first + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    given = key < U
    k_rows = _rows_of(k + head * head_k, key, stride_k, channel, given, D, BLOCK_D, True)
    v_rows = _rows_of(v + head * head_v, key, stride_v, channel, given, D, BLOCK_D, True)
    last = tl.load(below + key, mask=given, other=0)
    if HAS_WINDOW:
        here = tl.load(place + key, mask=given, other=0)
    end = tl.load(ends + tile)
    steps = tl.cdiv(end - first, QUERIES)
    to_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    to_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for step in tl.range(0, GROUP * steps):
        above = head * GROUP + step // steps
        row = first + step % steps * QUERIES + tl.arange(0, QUERIES)
        inside = row < end
        q_rows = _rows_of(q + above * head_q, row, stride_q, channel, inside, D, BLOCK_D, True)
        g_rows = _rows_of(grad + above * head_g, row, stride_g, channel, inside, D, BLOCK_D, True)
        at = above.to(tl.int64) * U + row
        z = _logits(tl.dot(k_rows, q_rows.T, input_precision=PRECISION), scale, cap, HAS_CAP)
        seen = (row[None, :] >= key[:, None]) & (row[None, :] < last[:, None])
        if HAS_WINDOW:
            seen &= tl.load(place + row, mask=inside, other=0)[None, :] - here[:, None] < window
        p = tl.where(seen, tl.exp2(z - tl.load(lse + at, mask=inside, other=0.0)[None, :]), 0.0)
        to_v = tl.dot(p.to(g_rows.dtype), g_rows, to_v, input_precision=PRECISION)
        dp = tl.dot(v_rows, g_rows.T, input_precision=PRECISION)
        dz = p * (dp - tl.load(dots + at, mask=inside, other=0.0)[None, :]) * _slope(z, cap, HAS_CAP)
        to_k = tl.dot(dz.to(q_rows.dtype), q_rows, to_k, input_precision=PRECISION)
    at = (key.to(tl.int64)[:, None] * (HEADS // GROUP) + head) * D + channel[None, :]
    stored = given[:, None] & (channel < D)[None, :]
    tl.store(dk + at, (to_k * scale).to(dk.dtype.element_ty), mask=stored)
    tl.store(dv + at, to_v.to(dv.dtype.element_ty), mask=stored)


@triton.jit
def _to_queries(
    total, q, g, lse, dots, k, v, row, low, high, keys, below, place, stride_k, stride_v, scale, cap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale, summed over the entries [low, high) of `keys`."""
    channel = tl.arange(0, BLOCK_D)
    for start in tl.range(low, high, KEYS):
        entry = start + tl.arange(0, KEYS)
        inside = entry < high
        key = tl.load(keys + entry, mask=inside, other=0) if MASKED else tl.load(keys + entry)
        k_rows = _rows_of(k, key, stride_k, channel, inside, D, BLOCK_D, MASKED)
        v_rows = _rows_of(v, key, stride_v, channel, inside, D, BLOCK_D, MASKED)
        z = _logits(tl.dot(q, k_rows.T, input_precision=PRECISION), scale, cap, HAS_CAP)
        p = tl.exp2(z - lse[:, None])
        if MASKED:
            p = tl.where(_seen(row, key, inside, below, place, window, HAS_WINDOW), p, 0.0)
        dp = tl.dot(g, v_rows.T, input_precision=PRECISION)
        dz = p * (dp - dots[:, None]) * _slope(z, cap, HAS_CAP)
        total = tl.dot(dz.to(k_rows.dtype), k_rows, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["U", "window"])
def to_queries_kernel(
    q, k, v, grad, lse, dots, dq, order, bounds, shared, keys, below, place, U, stride_q, head_q, stride_k, head_k,
    stride_v, head_v, stride_g, head_g, scale, cap, window, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dq [U, Hq, D]."""
    tile, head = tl.load(order + tl.program_id(0)), tl.program_id(1)
    row, channel = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, BLOCK_D)
    given = row < U
    q_rows = _rows_of(q + head * head_q, row, stride_q, channel, given, D, BLOCK_D, True)
    g_rows = _rows_of(grad + head * head_g, row, stride_g, channel, given, D, BLOCK_D, True)
    at = head.to(tl.int64) * U + row
    row_lse = tl.load(lse + at, mask=given, other=0.0)
    row_dots = tl.load(dots + at, mask=given, other=0.0)
    row = tl.where(given, row, 0)
    k += (head // GROUP) * head_k
    v += (head // GROUP) * head_v
    low, high = tl.load(bounds + tile), tl.load(bounds + tile + 1)
    middle = low + tl.load(shared + tile) // KEYS * KEYS
    total = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    total = _to_queries(
        total, q_rows, g_rows, row_lse, row_dots, k, v, row, low, middle, keys, below, place, stride_k, stride_v, scale,
        cap, window, D, BLOCK_D, KEYS, HAS_CAP, HAS_WINDOW, False, PRECISION,
    )  # fmt: skip
    total = _to_queries(
        total, q_rows, g_rows, row_lse, row_dots, k, v, row, middle, high, keys, below, place, stride_k, stride_v,
        scale, cap, window, D, BLOCK_D, KEYS, HAS_CAP, HAS_WINDOW, True, PRECISION,
    )  # fmt: skip
    row = tile * QUERIES + tl.arange(0, QUERIES)
    at = dq + (row.to(tl.int64)[:, None] * HEADS + head) * D + channel[None, :]
    tl.store(at, (total * scale).to(dq.dtype.element_ty), mask=given[:, None] & (channel < D)[None, :])


class Options(NamedTuple):
    """Those of `ops.tree_attention`."""

    scale: float
    softcap: float | None = None
    window: int | None = None


def _strides(*tensors: Tensor) -> list[int]:
    """Between tokens, and between heads."""
    assert all(x.stride(2) == 1 for x in tensors)
    return [stride for x in tensors for stride in x.stride()[:2]]


def _common(q: Tensor, k: Tensor, options: Options, blocks: Blocks) -> dict[str, Any]:
    d = q.shape[2]
    return {
        "scale": options.scale, "cap": options.softcap or 1.0, "window": options.window or 0,
        "GROUP": q.shape[1] // k.shape[1], "HEADS": q.shape[1], "D": d, "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "QUERIES": blocks.queries, "KEYS": blocks.keys, "HAS_CAP": options.softcap is not None,
        "HAS_WINDOW": options.window is not None, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor, tiles: QueryTiles, options: Options, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """q [U, Hq, D]; k, v [U, Hkv, D] -> out [U, Hq, D], log-sum-exp [Hq, U] in base 2. tiles: of blocks.queries."""
    u, heads, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((heads, u), dtype=torch.float32)
    with torch.cuda.device_of(q):
        attend_kernel[(len(tiles.order), heads)](
            q, k, v, out, lse, *tiles, u, *_strides(q, k, v), **_common(q, k, options, blocks)
        )  # fmt: skip
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: QueryTiles, keys: KeyTiles,
    options: Options, to_keys: Blocks, to_queries: Blocks,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv. queries, keys: tiles of to_queries.queries and of to_keys.keys."""
    u, heads, d = q.shape
    dots, dq = torch.empty_like(lse), q.new_empty(q.shape)
    dk, dv = (k.new_empty(k.shape) for _ in "kv")
    with torch.cuda.device_of(q):
        dot_out_kernel[(triton.cdiv(u, 64), heads)](
            grad, out, dots, u, *_strides(grad), HEADS=heads, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), ROWS=64
        )  # fmt: skip
        strides = _strides(q, k, v, grad)
        to_keys_kernel[(len(keys.order), k.shape[1])](
            q, k, v, grad, lse, dots, dk, dv, *keys, u, *strides, **_common(q, k, options, to_keys)
        )  # fmt: skip
        to_queries_kernel[(len(queries.order), heads)](
            q, k, v, grad, lse, dots, dq, *queries, u, *strides, **_common(q, k, options, to_queries)
        )  # fmt: skip
    return dq, dk, dv
