"""The three products of a head over chunks of rows: logits, dHidden, dWeight. All rows' logits never exist at once.

T rows, H hidden size, V vocabulary, C rows of a chunk. Products run in hidden's dtype; the gradient of the weight
(and of the bias) is summed over chunks in float32 (float64 for float64) and leaves in the weight's own dtype, so that
a float32 master of a bfloat16 computation gets it unrounded. On CUDA the logits of a bfloat16 head are float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# A chunk's logits take about this much, whatever memory is free: equal inputs give equal chunks, and equal bits. On the
# CPU that keeps them near the caches, on CUDA it fills the device.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
MIN_ROWS = 128  # more where dWeight does not fit a cache, because every chunk reads and writes all of it
LARGE_WEIGHT = 32 << 20


def chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """C, in whole tiles of 128 rows where it is as much."""
    bytes_each = 6 if _direct(hidden) else hidden.element_size()
    rows = CHUNK_BYTES[hidden.device.type] // (weight.shape[0] * bytes_each)
    least = MIN_ROWS
    if weight.numel() * 4 > LARGE_WEIGHT:
        least *= 2 if hidden.element_size() > 2 else 4  # in as many bytes
    return max(least, rows - rows % 128)


def _direct(hidden: Tensor) -> bool:
    """Whether products of bfloat16 factors come out in float32."""
    return hidden.device.type == "cuda" and hidden.dtype == torch.bfloat16


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """One head during one pass. Gradients are formed for what `needs` (hidden, weight, bias) asks for, and no other."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        self.needs = needs
        self.chunk = min(chunk_rows(hidden, weight), max(hidden.shape[0], 1))
        self.weight = weight.to(hidden.dtype)
        self.dtypes = weight.dtype, bias.dtype if bias is not None else weight.dtype
        self.direct = _direct(hidden)
        self.bias = None if bias is None else bias.to(torch.float32 if self.direct else hidden.dtype)
        self.buffer = hidden.new_empty(
            (self.chunk, weight.shape[0]), dtype=torch.float32 if self.direct else hidden.dtype
        )
        self.d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.d_weight: Tensor | None = None
        self.d_bias = hidden.new_zeros(weight.shape[0], dtype=wide(hidden.dtype)) if needs[2] else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[C, H] -> [C, V], in a buffer that the next call overwrites."""
        out = self.buffer[: hidden.shape[0]]
        columns = self.weight.t()
        if self.direct:
            torch.mm(hidden, columns, out_dtype=torch.float32, out=out)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is not None:
            return torch.addmm(self.bias, hidden, columns, out=out)
        return torch.mm(hidden, columns, out=out)

    def gradient_buffer(self, logits: Tensor) -> Tensor:
        """Where the row pass writes dLogits: over the logits themselves where the dtype allows."""
        return torch.empty_like(logits, dtype=self.weight.dtype) if self.direct else logits

    def backward(self, d_logits: Tensor, hidden: Tensor, index: Tensor, live: Tensor) -> None:
        """Adds the chunk's gradients: of its `live` [C] rows, which are rows `index` [C] of all."""
        d_logits, hidden, index = _compact(d_logits, hidden, index, live)
        if index.numel() == 0:
            return
        if self.d_hidden is not None:
            self.d_hidden.index_copy_(0, index, torch.mm(d_logits, self.weight))
        if self.needs[1]:
            self._add_weight(d_logits, hidden)
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0, dtype=self.d_bias.dtype)

    def _add_weight(self, d_logits: Tensor, hidden: Tensor) -> None:
        a, b, kind = d_logits.t(), hidden, wide(hidden.dtype)
        if self.direct:
            if self.d_weight is None:
                self.d_weight = torch.mm(a, b, out_dtype=kind)
            else:
                torch.addmm(self.d_weight, a, b, out_dtype=kind, out=self.d_weight)
            return
        if self.dtypes[0] == kind:
            a, b = a.to(kind), b.to(kind)  # the CPU has no product of bfloat16 into float32
        if self.d_weight is None:
            self.d_weight = torch.mm(a, b)
        elif a.dtype == kind:
            self.d_weight.addmm_(a, b)
        else:
            self.d_weight = self.d_weight.to(kind).add_(torch.mm(a, b))  # terms are rounded as their sum will be

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dHidden, dWeight, dBias; empty where not needed."""
        nothing = self.weight.new_empty(0)
        d_hidden, d_weight, d_bias = nothing, nothing.clone(), nothing.clone()
        if self.d_hidden is not None:
            d_hidden = self.d_hidden
        if self.needs[1]:
            found = torch.zeros_like(self.weight) if self.d_weight is None else self.d_weight
            d_weight = found.to(self.dtypes[0])
        if self.d_bias is not None:
            d_bias = self.d_bias.to(self.dtypes[1])
        return d_hidden, d_weight, d_bias


def _compact(d_logits: Tensor, hidden: Tensor, index: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Only the live rows, first: rows from behind fill the gaps, in place, so that few of them are moved."""
    keep = live.nonzero().squeeze(-1)
    count = keep.numel()
    if count == live.numel():
        return d_logits, hidden, index
    gaps = (~live[:count]).nonzero().squeeze(-1)
    order = torch.arange(count, device=live.device)
    order[gaps] = keep[keep >= count]
    d_logits[gaps] = d_logits[order[gaps]]
    return d_logits[:count], hidden[order], index[order]


def needs_gradient(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """What autograd will ask for: a frozen head or no_grad saves its product."""
    on = torch.is_grad_enabled()
    return on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of `Products.gradients`."""
    nothing = hidden.new_empty(0)
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else nothing,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else torch.empty_like(nothing),
        torch.empty_like(bias) if bias is not None and needs[2] else torch.empty_like(nothing),
    )
