"""Attention of new tokens to a cache of blocks in Triton: the GPU version of `csrc/cache_attention.cpp`.

A row is a query head of a new token. A key head has R = Q G rows, with the G heads of a token adjacent. One program
takes consecutive rows of a key head, from any number of tokens, so a block shared by several texts is read once for all
of them. It iterates over the tiles that its rows see, with an online softmax. If this gives too few programs, as for
one long text, several programs each take an equal share of the tiles, and another kernel joins their results in order.

The list of visible tiles is computed on the device, because the host would have to wait and could not be part of a CUDA
graph. A separate kernel computes it: all heads and shares use the same list, and equal shares of the list are equal
work, while equal shares of all tiles are not. A list has space for all T tiles, so that its size depends only on
shapes.

A kernel cannot raise errors. A slot outside the cache is not written, and a row that would see a tile outside the cache
gets NaN.

Shapes: Q new tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D channels, DV in a row of values; T tiles; B blocks
of rows; S shares.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from dwrl_fast.kernels.attention import HIDDEN, Blocks, _logits, _padded, _strides
from torch import Tensor

KEPT, LISTED, JOINED = 16, 64, 16  # tokens, tiles and rows per program of the other kernels
# Work is split into shares until there are several programs per multiprocessor, but a share has at least this many
# tiles.
PROGRAMS, SHORTEST_SHARE = 512, 4

# Rows and keys of a step. They fit into the 99 KiB of consumer GPUs; for float32, without tensor cores, into registers.
NARROW, WIDE = Blocks(64, 64, 4, 2), Blocks(64, 32, 8, 2)  # up to 128 channels, and more
FLOAT32, FLOAT32_WIDE = Blocks(32, 16, 8, 1), Blocks(16, 16, 8, 1)


def sizes(dtype: torch.dtype, channels: int) -> Blocks:
    """The tile sizes for heads with `channels` channels, at most 256."""
    if dtype == torch.bfloat16:
        return NARROW if channels <= 128 else WIDE
    return FLOAT32 if channels <= 128 else FLOAT32_WIDE


@triton.jit(do_not_specialize=["Q", "capacity"])
def keep_kernel(
    k, v, key_blocks, value_blocks, slot, Q, capacity, stride_k, head_k, stride_v, head_v, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Store keys and values of new tokens of one head in their slots. Rows of values are padded with zeros."""
    token, head, channel = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1), tl.arange(0, BLOCK_D)
    to = tl.load(slot + token, mask=token < Q, other=-1)
    kept = ((to >= 0) & (to < capacity))[:, None]
    inside = kept & (channel < D)[None, :]
    row = token.to(tl.int64)[:, None]
    k_rows = tl.load(k + head * head_k + row * stride_k + channel[None, :], mask=inside, other=0.0)
    v_rows = tl.load(v + head * head_v + row * stride_v + channel[None, :], mask=inside, other=0.0)
    block, place = to // BLOCK * HEADS + head, to % BLOCK
    tl.store(key_blocks + (block[:, None] * D + channel[None, :]) * BLOCK + place[:, None], k_rows, mask=inside)
    at = value_blocks + (block * BLOCK + place)[:, None] * DV + channel[None, :]
    tl.store(at, v_rows, mask=kept & (channel < DV)[None, :])


@triton.jit
def _short(x):
    """Clamp to 32 bits, for values that are compared with every row. Negative stays negative, huge stays huge."""
    return tl.minimum(tl.maximum(x, -1), 1 << 30).to(tl.int32)


@triton.jit(do_not_specialize=["Q", "T", "capacity", "window"])
def list_kernel(
    seen, counts, position, tiles, Q, T, capacity, window, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The tiles that a block of rows sees, in order: the first `counts` [B] entries of `seen` [B, T]. The count is -1
    if one of them is outside the cache.
    """
    block = tl.program_id(0)
    token = ((block * ROWS + tl.arange(0, ROWS)) // GROUP)[:, None]
    here = _short(tl.load(position + token, mask=token < Q, other=-1))  # sees no tile
    seen += block.to(tl.int64) * T
    found = 0
    outside = 0
    for start in tl.range(0, T, TILES):
        tile = start + tl.arange(0, TILES)
        row, there = tiles + tile.to(tl.int64) * 5, tile < T
        of = tl.load(row, mask=there, other=0)
        place = _short(tl.load(row + 1, mask=there, other=0))
        count = _short(tl.load(row + 2, mask=there, other=0))
        first = _short(tl.load(row + 3, mask=there, other=0))
        last = _short(tl.load(row + 4, mask=there, other=0))  # no token if there is no tile
        sees = (token >= first[None, :]) & (token < last[None, :]) & (here >= place[None, :])
        if HAS_WINDOW:
            sees &= here - (place + count)[None, :] < window - 1
        listed = tl.max(sees.to(tl.int32), 0)
        held = (of >= 0) & (of * BLOCK < capacity) & (place >= 0) & (count > 0) & (count <= BLOCK)
        held &= (first >= 0) & (last <= Q)
        outside = tl.maximum(outside, tl.max(tl.where(held, 0, listed), 0))
        tl.store(seen + found + tl.cumsum(listed, 0) - listed, tile, mask=listed > 0)
        found += tl.sum(listed, 0)
    tl.store(counts + block, tl.where(outside > 0, -1, found))


@triton.jit(do_not_specialize=["Q", "T", "window", "shares"])
def attend_kernel(
    q, key_blocks, value_blocks, out, parts, maxima, sums, seen, counts, position, tiles, Q, T, shares, stride_q,
    head_q, scale, cap, window, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows of one key head and a share of the tiles that they see: out [Q, Hq, D]; if SHARED, the partial
    results: parts [S, Hkv, R, D], and maxima (in base 2) and sums of weights [S, Hkv, R].
    """
    block, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, channel = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token, given = row // GROUP, row < Q * GROUP
    above = head * GROUP + row % GROUP
    stored = given[:, None] & (channel < D)[None, :]
    at = q + token.to(tl.int64)[:, None] * stride_q + above[:, None] * head_q + channel[None, :]
    q_rows = tl.load(at, mask=stored, other=0.0)
    here = _short(tl.load(position + token, mask=given, other=-1))
    seen += block.to(tl.int64) * T
    count_seen = tl.load(counts + block)
    each = tl.cdiv(tl.maximum(count_seen, 0), shares)
    low, high = share * each, tl.minimum(share * each + each, count_seen)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    most = tl.full([ROWS], HIDDEN, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for entry in tl.range(low * (BLOCK // KEYS), high * (BLOCK // KEYS)):
        tile = tiles + tl.load(seen + entry // (BLOCK // KEYS)).to(tl.int64) * 5
        of, place, count = tl.load(tile) * HEADS + head, _short(tl.load(tile + 1)), _short(tl.load(tile + 2))
        first, last = _short(tl.load(tile + 3)), _short(tl.load(tile + 4))
        own = entry % (BLOCK // KEYS) * KEYS + tl.arange(0, KEYS)
        # Keys that were never written are read too, in whole vectors, and their logits are masked. Values that were
        # never written must not be read, because 0 * NaN is NaN.
        k_at = key_blocks + (of * D + channel)[:, None] * BLOCK + own[None, :]
        k_columns = tl.load(k_at) if D == BLOCK_D else tl.load(k_at, mask=(channel < D)[:, None], other=0.0)
        z = _logits(tl.dot(q_rows, k_columns, input_precision=PRECISION), scale, cap, HAS_CAP)
        back = here[:, None] - (place + own)[None, :]
        sees = ((token >= first) & (token < last))[:, None] & (own < count)[None, :] & (back >= 0)
        if HAS_WINDOW:
            sees &= back < window
        z = tl.where(sees, z, -float("inf"))
        higher = tl.maximum(most, tl.max(z, 1))
        fade = tl.exp2(most - higher)
        p = tl.exp2(z - higher[:, None])
        weight = weight * fade + tl.sum(p, 1)
        v_at = value_blocks + (of * BLOCK + own)[:, None] * DV + channel[None, :]
        v_rows = tl.load(v_at, mask=(own < count)[:, None] & (channel < DV)[None, :], other=0.0)
        total = tl.dot(p.to(v_rows.dtype), v_rows, total * fade[:, None], input_precision=PRECISION)
        most = higher
    total = tl.where(count_seen < 0, float("nan"), total)
    if SHARED:
        at = (share * HEADS + head).to(tl.int64) * (Q * GROUP) + row
        tl.store(maxima + at, most, mask=given)
        tl.store(sums + at, weight, mask=given)
        tl.store(parts + at[:, None] * D + channel[None, :], total, mask=stored)
    else:
        at = out + (token.to(tl.int64) * (HEADS * GROUP) + above)[:, None] * D + channel[None, :]
        weight = tl.where(weight == 0, 1.0, weight)  # a row that sees nothing gets 0
        tl.store(at, (total / weight[:, None]).to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["Q", "shares"])
def join_kernel(
    parts, maxima, sums, out, Q, shares, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [Q, Hq, D] for rows of one key head: joins the partial results of `attend_kernel` in order."""
    row, head, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, BLOCK_D)
    given = row < Q * GROUP
    stored = given[:, None] & (channel < D)[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    most = tl.full([ROWS], HIDDEN, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    at = head.to(tl.int64) * (Q * GROUP) + row
    for _ in tl.range(0, shares):
        its = tl.load(maxima + at, mask=given, other=HIDDEN)
        higher = tl.maximum(most, its)
        fade, rise = tl.exp2(most - higher), tl.exp2(its - higher)
        weight = weight * fade + tl.load(sums + at, mask=given, other=0.0) * rise
        part = tl.load(parts + at[:, None] * D + channel[None, :], mask=stored, other=0.0)
        total = total * fade[:, None] + part * rise[:, None]
        most = higher
        at += Q * (GROUP * HEADS)
    at = out + ((row // GROUP).to(tl.int64) * (HEADS * GROUP) + head * GROUP + row % GROUP)[:, None] * D
    weight = tl.where(weight == 0, 1.0, weight)
    tl.store(at + channel[None, :], (total / weight[:, None]).to(out.dtype.element_ty), mask=stored)


def attend(
    q: Tensor, k: Tensor, v: Tensor, key_blocks: Tensor, value_blocks: Tensor, position: Tensor, slot: Tensor,
    tiles: Tensor, blocks: Blocks, scale: float, softcap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """out [Q, Hq, D] of q [Q, Hq, D]; k, v [Q, Hkv, D] are stored in key_blocks [C, Hkv, D, BLOCK] and value_blocks [C,
    Hkv, BLOCK, DV]. Q must be above 0. The launches depend only on shapes.
    """
    (tokens, query_heads, d), heads = q.shape, k.shape[1]
    count, block, dv = len(tiles), *value_blocks.shape[2:]
    group, capacity, padded = query_heads // heads, len(key_blocks) * block, _padded(d)
    rows = min(blocks.queries, max(16, triton.next_power_of_2(tokens * group)))
    row_blocks = triton.cdiv(tokens * group, rows)
    shares = max(1, min(PROGRAMS // (row_blocks * heads), count // SHORTEST_SHARE))
    windowed: dict[str, Any] = {"window": window or 0, "HAS_WINDOW": window is not None}
    shape: dict[str, int] = {"HEADS": heads, "D": d, "BLOCK_D": padded}
    out, wide = q.new_empty(q.shape), {"dtype": torch.float32, "device": q.device}
    seen, counts = (torch.empty(n, dtype=torch.int32, device=q.device) for n in ((row_blocks, count), row_blocks))
    many = shares if shares > 1 else 0
    maxima, sums = (torch.empty((many, heads, tokens * group), **wide) for _ in "ms")  # type: ignore[call-overload]
    parts = maxima.new_empty((many, heads, tokens * group, d))
    with torch.cuda.device_of(q):
        keep_kernel[(triton.cdiv(tokens, KEPT), heads)](
            k, v, key_blocks, value_blocks, slot, tokens, capacity, *_strides(k, v), **shape, DV=dv, BLOCK=block,
            TOKENS=KEPT,
        )  # fmt: skip
        list_kernel[(row_blocks,)](
            seen, counts, position, tiles, tokens, count, capacity, **windowed, GROUP=group, BLOCK=block, ROWS=rows,
            TILES=LISTED,
        )  # fmt: skip
        attend_kernel[(row_blocks, heads, shares)](
            q, key_blocks, value_blocks, out, parts, maxima, sums, seen, counts, position, tiles, tokens, count, shares,
            *_strides(q), scale, softcap or 1.0, **windowed, **shape, GROUP=group, DV=dv, BLOCK=block, ROWS=rows,
            KEYS=blocks.keys, HAS_CAP=softcap is not None, SHARED=shares > 1,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        if shares > 1:
            join_kernel[(triton.cdiv(tokens * group, JOINED), heads)](
                parts, maxima, sums, out, tokens, shares, **shape, GROUP=group, ROWS=JOINED
            )  # fmt: skip
    return out
