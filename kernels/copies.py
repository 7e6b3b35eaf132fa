"""The gradient of a gather: a row that was read several times gets the sum of its copies' gradients.

One program computes one row of the result. It reads the copies a few at a time, in the given order, and sums in
float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COPIES = 8  # read at once, so that a row with hundreds of copies does not wait for each


@triton.jit
def sum_copies_kernel(copies, order, bounds, sums, CHANNELS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """One block of channels of one row of `sums`."""
    u = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds + u)
    stop = tl.load(bounds + u + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    while start < stop:  # a range of loaded numbers is more than the interpreter of Triton 3.6 can
        place = start + tl.arange(0, COPIES)
        row = tl.load(order + place, mask=place < stop, other=0)
        inside = (place < stop)[:, None] & (column < CHANNELS)[None, :]
        total += tl.sum(
            tl.load(copies + row[:, None] * CHANNELS + column[None, :], mask=inside, other=0.0).to(tl.float32), 0
        )
        start += COPIES
    tl.store(sums + u * CHANNELS + column, total.to(sums.dtype.element_ty), mask=column < CHANNELS)


@torch.library.custom_op("dwrl_fast::tree_sum_copies", mutates_args=())
def sum_copies(copies: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    """[Tk, ...] -> [U, ...]: row u is the sum of the rows order[bounds[u]:bounds[u + 1]], in copies' dtype."""
    copies = copies.contiguous()
    sums = copies.new_empty((len(bounds) - 1, *copies.shape[1:]))
    channels = sums[0].numel()
    block = min(512, triton.next_power_of_2(channels))
    with torch.cuda.device_of(copies):
        sum_copies_kernel[(len(sums), triton.cdiv(channels, block))](
            copies, order, bounds, sums, CHANNELS=channels, COPIES=COPIES, BLOCK=block
        )
    return sums


@sum_copies.register_fake
def _(copies: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    return copies.new_empty((bounds.shape[0] - 1, *copies.shape[1:]))
