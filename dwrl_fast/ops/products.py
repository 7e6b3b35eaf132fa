"""The three products of a head over chunks of rows: logits, dHidden, dWeight. The logits of all rows never exist at the
same time.

T rows, H hidden size, V vocabulary, B rows of a block, C of a chunk. Products run in hidden's dtype; the gradient of
the weight (and of the bias) is summed over blocks in float32 (float64 for float64) and returned in the weight's own
dtype, so that a float32 master of a bfloat16 computation gets it unrounded. On CUDA the logits of a bfloat16 head are
float32 and their gradients bfloat16: a block has several chunks, which share the memory of the logits. Elsewhere a
block is one chunk, and the gradient overwrites the logits.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Approximate size of a chunk's logits, independent of free memory: equal inputs give equal chunks and equal bits. On
# the CPU the logits then fit into the caches. On CUDA a product needs some thousand rows, and every block reads and
# writes all of a float32 dWeight: therefore the gradients of CHUNKS chunks are collected, in twice the bytes of a
# chunk's logits.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 600 << 20}
CHUNKS = 4
MIN_ROWS = 128  # more if dWeight does not fit into a cache, because every chunk reads and writes all of it
LARGE_WEIGHT = 32 << 20


def chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """C, the number of rows of logits per chunk: a multiple of 128. hidden: [T, H], weight: [V, H]."""
    return _chunk_rows(weight.shape, hidden.element_size(), hidden.device.type, direct=_direct(hidden))


def _chunk_rows(head: Sequence[int], itemsize: int, device: str, *, direct: bool) -> int:
    rows = CHUNK_BYTES[device] // (head[0] * (4 if direct else itemsize))
    least = MIN_ROWS
    if head[0] * head[1] * 4 > LARGE_WEIGHT:
        least *= 2 if itemsize > 2 else 4  # in the same number of bytes
    return max(least, rows - rows % 128)


def workspace_bytes(
    rows: int, head: Sequence[int], dtype: torch.dtype, device: str, *, gradients: bool = True, trained: bool = True
) -> int:
    """The bytes of working memory of a pass over `rows` rows, without its inputs and results, for a head [V, H] whose
    products are computed in `dtype` on a `device` of this type: logits; with `gradients` their gradients; and dWeight
    of a `trained` head if it is summed in a wider dtype.
    """
    direct = _gives_float32(dtype, device)
    chunk = _chunk_rows(head, dtype.itemsize, device, direct=direct)
    logits = piece_rows(rows, chunk, device) * head[0] * (4 if direct else dtype.itemsize)
    if not gradients:
        return logits
    waiting = piece_rows(rows, chunk * CHUNKS, device) * head[0] * dtype.itemsize if direct else 0
    return logits + waiting + (4 * head[0] * head[1] if trained and dtype.itemsize < 4 else 0)


def piece_rows(rows: int, most: int, device: str) -> int:
    """The rows of each piece if `rows` rows are split, at most `most`. On CUDA: as few pieces as possible, all of about
    equal size, in tiles of 128 rows, because a small last piece would also read all of the weight and of dWeight.
    """
    each = most if device == "cpu" else -(-rows // max(-(-rows // most), 1))
    return max(1, min(most, each if device == "cpu" else each + -each % 128, rows))


def _direct(hidden: Tensor) -> bool:
    """Whether products of bfloat16 factors can be returned in float32."""
    return _gives_float32(hidden.dtype, hidden.device.type)


def _gives_float32(dtype: torch.dtype, device: str) -> bool:
    return device == "cuda" and dtype == torch.bfloat16


def _into_float32(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a b, or out + a b, for bfloat16 factors, without rounding to bfloat16."""
    if add:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over elements of `dtype`: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """The products of one head in one pass. Gradients are computed only if needed. needs: flags for (hidden, weight,
    bias).
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        self.needs = needs
        self.chunk = chunk_rows(hidden, weight)
        self.weight = weight.to(hidden.dtype)
        self.dtypes = weight.dtype, bias.dtype if bias is not None else weight.dtype
        self.direct = _direct(hidden)
        self.bias = None if bias is None else bias.to(torch.float32 if self.direct else hidden.dtype)
        self.buffer: Tensor | None = None
        self.d_logits: Tensor | None = None
        self.d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.d_weight: Tensor | None = None
        self.d_bias = hidden.new_zeros(weight.shape[0], dtype=wide(hidden.dtype)) if needs[2] else None

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Row numbers [N] in blocks, the largest first."""
        block = self.chunk * (CHUNKS if self.direct else 1)
        return rows.split(piece_rows(len(rows), block, rows.device.type))

    def chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The chunks of a block, or of all rows if no gradient is needed: the slice of `hidden` [B, H], the logits [C,
        V] (overwritten by the next chunk), and the buffer [C, V] into which the row functions write their gradient.
        """
        if self.buffer is None:
            kind = torch.float32 if self.direct else hidden.dtype
            size = piece_rows(len(hidden), self.chunk, hidden.device.type)
            self.buffer = hidden.new_empty((size, self.weight.shape[0]), dtype=kind)
        # A smaller block could have larger chunks: 1,924 rows in two of 1,024, but 2,176 rows in three of 768.
        size = piece_rows(len(hidden), len(self.buffer), hidden.device.type)
        if any(self.needs) and self.d_logits is None:
            self.d_logits = hidden.new_empty((len(hidden), self.weight.shape[0])) if self.direct else self.buffer
        for start in range(0, len(hidden), size):
            part = slice(start, min(start + size, len(hidden)))
            logits = self._logits(hidden[part], self.buffer[: part.stop - start])
            yield part, logits, None if self.d_logits is None else self.d_logits[part]

    def _logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        columns = self.weight.t()
        if self.direct:
            _into_float32(hidden, columns, out)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is not None:
            return torch.addmm(self.bias, hidden, columns, out=out)
        return torch.mm(hidden, columns, out=out)

    def backward(self, hidden: Tensor, index: Tensor, live: Tensor) -> None:
        """Add the gradients of a block, after iterating over all its `chunks`.

        hidden: [B, H]. index: [B] int64, the indices of the block's rows among all rows. live: [B] bool, the rows whose
        gradient is not 0.
        """
        assert self.d_logits is not None
        d_logits, hidden, index = _compact(self.d_logits[: len(index)], hidden, index, live)
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
                self.d_weight = _into_float32(a, b, b.new_empty(self.weight.shape, dtype=kind))
            else:
                _into_float32(a, b, self.d_weight, add=True)
            return
        if self.dtypes[0] == kind:
            a, b = a.to(kind), b.to(kind)  # the CPU has no product of bfloat16 factors with float32 result
        if self.d_weight is None:
            self.d_weight = torch.mm(a, b)
        elif a.dtype == kind:
            self.d_weight.addmm_(a, b)
        else:
            self.d_weight = self.d_weight.to(kind).add_(torch.mm(a, b))  # terms are rounded to the dtype of their sum

    def gradients(self, wide_weight: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """dHidden [T, H], dWeight [V, H], dBias [V]; empty if not needed.

        With `wide_weight` dWeight on CUDA stays in the dtype of its sum.
        """
        weight = torch.zeros_like(self.weight) if self.needs[1] and self.d_weight is None else self.d_weight
        found = (
            self.d_hidden,
            None if weight is None else weight.to(_weight_dtype(weight, self.dtypes[0], wide_weight)),
            None if self.d_bias is None else self.d_bias.to(self.dtypes[1]),
        )
        d_hidden, d_weight, d_bias = (self.weight.new_empty(0) if x is None else x for x in found)
        return d_hidden, d_weight, d_bias


def _compact(d_logits: Tensor, hidden: Tensor, index: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep only the live rows, at the front. Rows from the end fill the gaps in place, so that few rows are moved."""
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
    """Which gradients autograd will need. A frozen head, or no_grad, saves the product."""
    on = torch.is_grad_enabled()
    return on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad


def _weight_dtype(like: Tensor, own: torch.dtype, wide_weight: bool) -> torch.dtype:
    return wide(own) if wide_weight and like.device.type == "cuda" else own


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], wide_weight: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised tensors with the shapes and dtypes of `Products.gradients`, for tracing."""
    nothing = hidden.new_empty(0)
    kind = _weight_dtype(weight, weight.dtype, wide_weight)
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else nothing,
        torch.empty_like(weight, dtype=kind, memory_format=torch.contiguous_format)
        if needs[1]
        else torch.empty_like(nothing),
        torch.empty_like(bias) if bias is not None and needs[2] else torch.empty_like(nothing),
    )
