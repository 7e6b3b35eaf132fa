"""Varlen attention on the CPU as CUDA's kernels document theirs: what takes their operators' place in the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.ops import varlen


def segment_logits(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, longest_q: int, longest_k: int, scale: float,
    causal: bool, window: tuple[int, int], softcap: float,
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Of each segment: its rows of q and of k, the heads of k and v as q has them, and the logits [Hq, Tq, Tk]."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and bounds_q.is_contiguous() and bounds_k.is_contiguous()
    assert bounds_q[0] == bounds_k[0] == 0 and bounds_q[-1] == len(q) and bounds_k[-1] == len(k)
    assert longest_q == bounds_q.diff().max() and longest_k == bounds_k.diff().max()
    assert bounds_q.diff().min() > 0 and bounds_k.diff().min() > 0  # the kernels leave empty segments unwritten
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    left, right = window[0], 0 if causal else window[1]
    group = q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(bounds_q.unfold(0, 2, 1).tolist(), bounds_k.unfold(0, 2, 1).tolist(), strict=True):
        wide_k, wide_v = (x[k0:k1].double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        logits = q[q0:q1].double().transpose(0, 1) @ wide_k.mT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        back = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)  # how far a key lies back
        hidden = torch.zeros_like(back, dtype=torch.bool)
        hidden |= (back > left) & (left >= 0)
        hidden |= (back < -right) & (right >= 0)
        yield slice(q0, q1), slice(k0, k1), wide_k, wide_v, logits.masked_fill(hidden, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=ops.products.wide(q.dtype))
    for rows, _, _, wide_v, logits in segment_logits(q, k, v, *rest):
        out[rows] = (logits.softmax(-1) @ wide_v).transpose(0, 1).to(q.dtype)
        lse[:, rows] = logits.logsumexp(-1).to(lse.dtype)
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """From the given out and lse alone, as the kernels do."""
    scale, softcap = rest[4], rest[7]
    dq, dk, dv = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    for rows, keys, wide_k, wide_v, logits in segment_logits(q, k, v, *rest):
        wide_grad, wide_out, wide_q = (x[rows].double().transpose(0, 1) for x in (grad, out, q))
        weights = (logits - lse[:, rows, None].double()).exp()
        d_logits = weights * (wide_grad @ wide_v.mT - (wide_grad * wide_out).sum(-1, keepdim=True))
        if softcap:
            d_logits = d_logits * (1 - (logits.clamp_min(-softcap) / softcap).square())
        dq[rows] = (d_logits @ wide_k * scale).transpose(0, 1).to(q.dtype)
        for total, part in ((dk, d_logits.mT @ wide_q * scale), (dv, weights.mT @ wide_grad)):
            total[keys] = part.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1).to(k.dtype)
    return dq, dk, dv


def aten_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not dropout_p and not return_debug_mask and not any(others.values())
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    out, lse = attend(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, window, 0.0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def aten_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
    cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not dropout_p and rng_state.numel() == 2
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    return attend_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, window, 0.0
    )


# Of flash_attn 2.8.3.
FLASH_FORWARD = (
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0., Tensor? alibi_slopes=None, "
    "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
    "bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
FLASH_BACKWARD = (
    "_flash_attn_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, "
    "Tensor? rng_state=None, bool zero_tensors=False) -> Tensor"
)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not dropout_p and not any(others)
    window = window_size_left, window_size_right
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return *attend(q, k, v, *lengths, softmax_scale, causal, window, softcap), torch.empty(0), torch.empty(2)


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: None, deterministic: bool, *others: Any,
) -> Tensor:  # fmt: skip
    assert deterministic and not dropout_p and alibi_slopes is None and not any(others)
    window = window_size_left, window_size_right
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    rest = *lengths, softmax_scale, causal, window, softcap
    for to_fill, found in zip((dq, dk, dv), attend_backward(dout, q, k, v, out, softmax_lse, *rest), strict=True):
        to_fill.copy_(found)
    return torch.empty(0)


@contextmanager
def in_place_of_cuda() -> Iterator[None]:
    with (
        torch.library._scoped_library("aten", "IMPL") as aten,
        torch.library._scoped_library("flash_attn", "FRAGMENT") as flash,
    ):
        aten.impl("_flash_attention_forward", aten_forward, "CPU")
        aten.impl("_flash_attention_backward", aten_backward, "CPU")
        if varlen._flash_attn_missing() is not None:
            flash.define(FLASH_FORWARD)
            flash.define(FLASH_BACKWARD)
        flash.impl("_flash_attn_varlen_forward", flash_forward, "CPU")
        flash.impl("_flash_attn_varlen_backward", flash_backward, "CPU")
        yield
