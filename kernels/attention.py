"""Attention over a tree of tokens in Triton: FlashAttention (arXiv 2205.14135) with the tiles of `ops/tiles.py`.

Tokens are stored in depth-first order, so query t sees key u if u <= t < below[u], the end of the subtree of u's node.
A tile of queries, from one or several nodes, iterates over one list of keys: the path of its first token and the tile
itself. Keys that all its queries see come first and need no mask. A tile of keys iterates over the queries from its
first key to the end of its subtree, which are contiguous, for all query heads that read it. So nothing is copied, and
the gradients of keys shared by thoughts are summed where they are computed. If these queries are many, as below the
root, several programs each take a run of them. Every sum has a fixed order, whatever else runs.

Shapes: U tokens, Hq query heads, Hkv key heads, D channels; TQ tiles of queries, TK of keys, E entries of all lists.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from dwrl_fast.kernels.rows import _capped
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ROWS = 64  # rows per program of dot_out_kernel
HIDDEN: tl.constexpr = tl.constexpr(-1.0e30)  # initial maximum of a row: finite, so that no difference is NaN


# The fields of the tuples in ops/tiles.py: order, bounds, shared, keys, below, place; and runs, split, parts, below,
# place.
Queries = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Keys = tuple[Tensor, Tensor, int, Tensor, Tensor]


class Blocks(NamedTuple):
    """Queries and keys of a tile, warps, and stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """The tile sizes of the three main kernels."""

    forward: Blocks
    to_keys: Blocks  # dK and dV
    to_queries: Blocks  # dQ


# Measured on an H100 for narrow heads. They also fit into the 99 KiB of consumer GPUs.
NARROW = Sizes(Blocks(128, 32, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3))
WIDE = Sizes(Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), Blocks(64, 32, 8, 1))  # more than 128 channels
# Tensor cores have no float32 product, so these are tiles whose sums fit into registers.
FLOAT32, FLOAT32_WIDE = (Sizes(*3 * [Blocks(rows, 16, 8, 1)]) for rows in (32, 16))


def sizes(dtype: torch.dtype, channels: int) -> Sizes:
    """The tile sizes for heads with `channels` channels, at most 256."""
    if dtype == torch.bfloat16:
        return NARROW if channels <= 128 else WIDE
    return FLOAT32 if channels <= 128 else FLOAT32_WIDE


@triton.jit
def _logits(products, scale, cap, HAS_CAP: tl.constexpr):
    """The logits, in base 2."""
    if HAS_CAP:
        return _capped(products * scale, cap, HAS_CAP) * LOG2E
    return products * (scale * LOG2E)


@triton.jit
def _rows_of(x, row, stride, channel, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] of one head; 0 beyond its channels and, if MASKED, in rows outside `mask`."""
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
    row = tl.where(given, row, 0)  # sees only the first entry of a list, and is not stored
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
def _sloped(dz, z, cap, HAS_CAP: tl.constexpr):
    """The gradient of a logit from that of the capped logit z (in base 2)."""
    if HAS_CAP:
        u = z / (cap * LOG2E)
        dz *= 1 - u * u
    return dz


@triton.jit(do_not_specialize=["U", "window"])
def to_keys_kernel(
    q, k, v, grad, lse, dots, dk, dv, parts, runs, below, place, U, stride_q, head_q, stride_k, head_k, stride_v,
    head_v, stride_g, head_g, scale, cap, window, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One run of queries, for all query heads that read the keys, over a tile of keys of one key head: dk and dv [U,
    Hkv, D], or `parts` [P, Hkv, 2, KEYS, D] if the tile has several runs.
    """
    run, head = runs + 4 * tl.program_id(0), tl.program_id(1)
    tile, low, end, part = tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)
    first = tile * KEYS
    key, channel = first + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    given = key < U
    k_rows = _rows_of(k + head * head_k, key, stride_k, channel, given, D, BLOCK_D, True)
    v_rows = _rows_of(v + head * head_v, key, stride_v, channel, given, D, BLOCK_D, True)
    last = tl.load(below + key, mask=given, other=0)
    if HAS_WINDOW:
        here = tl.load(place + key, mask=given, other=0)
    steps = tl.cdiv(end - low, QUERIES)
    to_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    to_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for step in tl.range(0, GROUP * steps):
        above = head * GROUP + step // steps
        row = low + step % steps * QUERIES + tl.arange(0, QUERIES)
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
        dz = _sloped(p * (dp - tl.load(dots + at, mask=inside, other=0.0)[None, :]), z, cap, HAS_CAP)
        to_k = tl.dot(dz.to(q_rows.dtype), q_rows, to_k, input_precision=PRECISION)
    to_k *= scale
    stored = given[:, None] & (channel < D)[None, :]
    if part < 0:
        at = (key.to(tl.int64)[:, None] * (HEADS // GROUP) + head) * D + channel[None, :]
        tl.store(dk + at, to_k.to(dk.dtype.element_ty), mask=stored)
        tl.store(dv + at, to_v.to(dv.dtype.element_ty), mask=stored)
    else:
        at = (part.to(tl.int64) * (HEADS // GROUP) + head) * (2 * KEYS * D)
        at += tl.arange(0, KEYS)[:, None] * D + channel[None, :]
        tl.store(parts + at, to_k, mask=stored)
        tl.store(parts + KEYS * D + at, to_v, mask=stored)


@triton.jit(do_not_specialize=["U"])
def sum_parts_kernel(
    parts, dk, dv, split, U, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr
):
    """dk and dv [U, Hkv, D] for a tile with several runs: the sum of its `parts` [P, Hkv, 2, KEYS, D], in order."""
    tile = tl.load(split + 3 * tl.program_id(0))
    low, high = tl.load(split + 3 * tl.program_id(0) + 1), tl.load(split + 3 * tl.program_id(0) + 2)
    head, own, channel = tl.program_id(1), tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    inside = (channel < D)[None, :]
    at = parts + (low.to(tl.int64) * HEADS + head) * (2 * KEYS * D) + own[:, None] * D + channel[None, :]
    to_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    to_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for _ in tl.range(low, high):
        to_k += tl.load(at, mask=inside, other=0.0)
        to_v += tl.load(at + KEYS * D, mask=inside, other=0.0)
        at += HEADS * 2 * KEYS * D
    key = tile * KEYS + own
    at = (key.to(tl.int64)[:, None] * HEADS + head) * D + channel[None, :]
    stored = inside & (key < U)[:, None]
    tl.store(dk + at, to_k.to(dk.dtype.element_ty), mask=stored)
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
        dz = _sloped(p * (dp - dots[:, None]), z, cap, HAS_CAP)
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


def _strides(*tensors: Tensor) -> list[int]:
    """Strides between tokens and between heads."""
    assert all(x.stride(2) == 1 for x in tensors)
    return [stride for x in tensors for stride in x.stride()[:2]]


def _common(
    q: Tensor, k: Tensor, blocks: Blocks, scale: float, softcap: float | None, window: int | None
) -> dict[str, Any]:
    d = q.shape[2]
    return {
        "scale": scale, "cap": softcap or 1.0, "window": window or 0,
        "GROUP": q.shape[1] // k.shape[1], "HEADS": q.shape[1], "D": d, "BLOCK_D": _padded(d),
        "QUERIES": blocks.queries, "KEYS": blocks.keys, "HAS_CAP": softcap is not None,
        "HAS_WINDOW": window is not None, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip


def _padded(channels: int) -> int:
    found: int = triton.next_power_of_2(channels)
    return max(16, found)


def attend(
    q: Tensor, k: Tensor, v: Tensor, tiles: Queries, blocks: Blocks, scale: float, softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [U, Hq, D]; k, v [U, Hkv, D] -> out [U, Hq, D], log-sum-exp [Hq, U] in base 2. tiles: of size
    blocks.queries.
    """
    u, heads, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((heads, u), dtype=torch.float32)
    with torch.cuda.device_of(q):
        attend_kernel[(len(tiles[0]), heads)](
            q, k, v, out, lse, *tiles, u, *_strides(q, k, v), **_common(q, k, blocks, scale, softcap, window)
        )  # fmt: skip
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Queries, keys: Keys,
    blocks: Sizes, scale: float, softcap: float | None, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv. queries, keys: tiles of sizes blocks.to_queries.queries and blocks.to_keys.keys."""
    u, heads, d = q.shape
    key_heads, key_tile = k.shape[1], blocks.to_keys.keys
    runs, split, parts_count, below, place = keys
    dots, dq = torch.empty_like(lse), q.new_empty(q.shape)
    dk, dv = (k.new_empty(k.shape) for _ in "kv")
    parts = lse.new_empty((parts_count, key_heads, 2, key_tile, d))
    strides = _strides(q, k, v, grad)
    with torch.cuda.device_of(q):
        dot_out_kernel[(triton.cdiv(u, ROWS), heads)](
            grad, out, dots, u, *_strides(grad), HEADS=heads, D=d, BLOCK_D=_padded(d), ROWS=ROWS
        )  # fmt: skip
        to_keys_kernel[(len(runs), key_heads)](
            q, k, v, grad, lse, dots, dk, dv, parts, runs, below, place, u, *strides,
            **_common(q, k, blocks.to_keys, scale, softcap, window),
        )  # fmt: skip
        if len(split):
            sum_parts_kernel[(len(split), key_heads)](
                parts, dk, dv, split, u, HEADS=key_heads, D=d, BLOCK_D=_padded(d), KEYS=key_tile
            )  # fmt: skip
        to_queries_kernel[(len(queries[0]), heads)](
            q, k, v, grad, lse, dots, dq, *queries, u, *strides,
            **_common(q, k, blocks.to_queries, scale, softcap, window),
        )  # fmt: skip
    return dq, dk, dv
