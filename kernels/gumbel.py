"""`gumbel_pick` in Triton: one program draws for one row of log-probs.

Sums of log-prob and noise are compared in float32. Of equal sums the first index wins, as in the definition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 512, 8  # Philox counters per step of a program, with four tokens each


@triton.jit
def _noise(bits):
    """-log(-log1p(-w)) for the words of Philox, with w as in `oracle.gumbel_pick`."""
    w = tl.minimum(bits.to(tl.uint32, bitcast=True).to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    # For small w, 1 - w would round away the noise with which a rare token wins. Five terms of the series have a
    # relative error of 2^-25.
    near = w * (1 + w * (1 / 2 + w * (1 / 3 + w * (1 / 4 + w * (1 / 5)))))
    return -tl.log(tl.where(w < 1 / 32, near, -tl.log(1 - w)))


@triton.jit
def pick_kernel(logprob, row_keys, row_positions, chosen, V: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logprob [R, V]: writes the chosen index into `chosen` [R]."""
    row = tl.program_id(0).to(tl.int64)
    key, high = tl.load(row_keys + row), tl.load(row_positions + row) << 32
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, V, 4 * BLOCK):
        low = start // 4 + tl.arange(0, BLOCK)
        words = tl.randint4x(key, high | low.to(tl.int64))
        for i in tl.static_range(4):
            token = 4 * low + i
            x = tl.load(logprob + row * V + token, mask=token < V, other=-float("inf"))
            value = tl.where(x == x, x + _noise(words[i]), float("inf"))  # a NaN is chosen, and the caller raises
            better = value > best
            best, place = tl.where(better, value, best), tl.where(better, token, place)
    most = tl.max(best, 0)
    tl.store(chosen + row, tl.min(tl.where(best == most, place, V), 0).to(tl.int64))


def pick(logprob: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """The chosen indices [R] int64 for logprob [R, V] float32, keys and positions [R] int64."""
    logprob, keys, positions = logprob.contiguous(), keys.contiguous(), positions.contiguous()
    chosen = torch.empty_like(keys)
    if len(keys):
        with torch.cuda.device_of(logprob):
            pick_kernel[(len(keys),)](
                logprob, keys, positions, chosen, V=logprob.shape[1], BLOCK=BLOCK, num_warps=WARPS
            )  # fmt: skip
    return chosen
