"""Tree attention with peers, forward and backward: PyTorch's varlen flash attention, and FlexAttention."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dwrl_fast.ops.oracle import Plan
from dwrl_fast.ops.tiles import forest, ranges


class Segments(NamedTuple):
    """Queries [bounds_q[s], bounds_q[s + 1]) attend causally, aligned at the ends, to the keys of the same segment,
    gathered from `keys`; None if the keys are in the same order as the queries.
    """

    bounds_q: Tensor
    bounds_k: Tensor
    longest_q: int
    longest_k: int
    keys: Tensor | None


def segments(plan: Plan, device: torch.device) -> Segments:
    """Each node of the plan with the keys on its path."""
    found = forest(plan, int(plan.stop[-1]))
    own = found.stop - found.start
    starts = np.concatenate([found.start[path] for path in found.paths])
    sizes = np.concatenate([own[path] for path in found.paths])
    seen = np.array([int(own[path].sum()) for path in found.paths])
    keys = None if all(len(path) == 1 for path in found.paths) else torch.from_numpy(ranges(starts, sizes)).to(device)
    own_bounds, seen_bounds = (
        torch.from_numpy(np.append(0, x.cumsum()).astype(np.int32)).to(device) for x in (own, seen)
    )
    return Segments(own_bounds, seen_bounds, int(own.max()), int(seen.max()), keys)


def attention(where: Segments, inputs: list[Tensor], gradient: Tensor, *, deterministic: bool = True) -> list[Tensor]:
    """dq, dk, dv with PyTorch's kernels, called through their operators, because no public function accepts the
    log-sum-exp.
    """
    q, k, v = (x.detach() for x in inputs)
    if where.keys is not None:
        k, v = k[where.keys], v[where.keys]
    given = {
        "cum_seq_q": where.bounds_q, "cum_seq_k": where.bounds_k, "max_q": where.longest_q, "max_k": where.longest_k,
        "dropout_p": 0.0, "is_causal": True, "scale": q.shape[-1] ** -0.5,
    }  # fmt: skip
    out, lse, *_ = torch.ops.aten._flash_attention_forward(query=q, key=k, value=v, return_debug_mask=False, **given)
    with _deterministic(deterministic):
        found = torch.ops.aten._flash_attention_backward(
            grad_out=gradient, query=q, key=k, value=v, out=out, logsumexp=lse,
            rng_state=torch.zeros(2, dtype=torch.uint64, device=q.device), unused=torch.empty(0, device=q.device),
            **given,
        )  # fmt: skip
    if where.keys is None:
        return list(found)
    dk, dv = (torch.zeros_like(inputs[1], dtype=torch.float32) for _ in "kv")
    for total, part in zip((dk, dv), found[1:], strict=True):
        total.index_add_(0, where.keys, part.float())
    return [found[0], dk.to(k.dtype), dv.to(v.dtype)]


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """A context for deterministic mode, for which the operator has no argument. Memory filling is off, because the
    operator writes all of its outputs.
    """
    settings: Any = torch.utils.deterministic
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention import flex_attention

    return torch.compile(flex_attention.flex_attention, dynamic=False)


_MASKS: dict[int, Any] = {}  # cached by plan, so that layers reuse them


def flex_attention(plan: Plan, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """dq, dk, dv with compiled FlexAttention and a block mask that is created once per plan."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = len(gradient)
    if id(plan) not in _MASKS:
        below = torch.from_numpy(forest(plan, tokens).tokenwise()[0]).to(gradient.device)
        _MASKS[id(plan)] = create_block_mask(
            lambda b, h, t, u: (u <= t) & (t < below[u]),
            None,
            None,
            tokens,
            tokens,
            device=gradient.device.type,
            _compile=True,
        )
    q, k, v = (x.transpose(0, 1)[None] for x in inputs)
    out = _compiled()(q, k, v, block_mask=_MASKS[id(plan)], enable_gqa=True)
    return list(torch.autograd.grad(out[0].transpose(0, 1), inputs, gradient))
