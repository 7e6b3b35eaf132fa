"""The row functions in Triton: the GPU version of `csrc/row_pass.cpp` and `csrc/policy_loss.cpp`.

One program processes one row of a chunk of logits [C, V], in two passes. The first pass keeps a running maximum, sum of
exponentials, and dot product for the entropy, all in float32 and separately for every position in a block, so that
threads synchronise once per row and not once per block. The second pass writes dLoss/d(head output). A row's logits are
z = cap tanh(x / cap) / temperature, x the head's output. Target and normaliser come from the same logits, so a
log-probability is never above 0. A target outside the vocabulary gives NaN, so no check has to wait for the device.

Logits are float32 or bfloat16; a gradient with the same dtype may overwrite them. The second pass runs backwards,
because the end of the row is still in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # eight values per thread: two loads of float32, the dtype of logits on a GPU
WARPS = 32
TOKENS = 1024


@triton.jit
def _capped(x, cap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        shortfall = _expm1(-2 * tl.abs(x) / cap)  # 1 - e^(-2x/cap) would cancel near 0
        size = -cap * shortfall / (2 + shortfall)
        x = tl.where(x < 0, -size, size)
    return x


@triton.jit
def _expm1(x):
    # The series is used where the difference would cancel. The first omitted term is below 2^-24 of the sum.
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1)


@triton.jit
def _bounded(z):
    return tl.where(z < -1.0e4, -1.0e4, z)  # avoids 0 * -inf in the dot product, but keeps NaN


@triton.jit
def _read_row(row, target, scale, cap, V: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """-> maximum m of the capped logits, log of sum e^(z - m), logprob, entropy."""
    known = (target >= 0) & (target < V)
    # Read before the first pass, whose reductions are barriers: afterwards another thread may overwrite it with the
    # gradient.
    chosen = _capped(tl.load(row + target, mask=known, other=float("nan")).to(tl.float32), cap, HAS_CAP)
    m = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _capped(tl.load(row + column, mask=column < V, other=0.0).to(tl.float32), cap, HAS_CAP)
        x = tl.where(column < V, x, -float("inf"))
        # One exponential in both cases: of the new value minus the maximum so far, or the reverse.
        rise = x - m
        z = _bounded(tl.abs(rise) * -scale)
        e = tl.exp(z)
        dot = tl.where(rise > 0, e * (dot + z * total), dot + e * z)
        total = tl.where(rise > 0, e * total + 1, total + e)
        m = tl.maximum(m, x)
    top = tl.max(m, 0)
    z = _bounded((m - top) * scale)
    e = tl.exp(z)
    dot = tl.sum(e * (dot + z * total), 0)
    total = tl.sum(e * total, 0)
    m = top
    log_total = tl.log(tl.cast(total, tl.float64))  # a few numbers per row, rounded once at the end
    logprob = (chosen - m).to(tl.float64) * scale - log_total
    entropy = log_total - tl.cast(dot, tl.float64) / total
    return m, log_total.to(tl.float32), logprob.to(tl.float32), entropy.to(tl.float32)


@triton.jit
def _write_row(
    row, out, target, scale, cap, m, log_total, logprob, entropy, k, h, V: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = [k (onehot - p) - h p (log p + entropy)] dz/dx."""
    for start in range(0, V, BLOCK):
        column = (V - 1) // BLOCK * BLOCK - start + tl.arange(0, BLOCK)
        x = _capped(tl.load(row + column, mask=column < V, other=0.0).to(tl.float32), cap, HAS_CAP)
        logp = (x - m) * scale - log_total
        p = tl.exp(logp)
        here = column == target
        g = tl.where(here, -k * _expm1(logprob), -k * p)
        if HAS_ENTROPY:
            g -= tl.where(p > 0, h * p * (logp + entropy), 0.0)
        if HAS_CAP:
            u = x / cap
            g *= 1 - u * u
        tl.store(out + column, (g * scale).to(out.dtype.element_ty), mask=column < V)


@triton.jit
def _token(logprob, old, advantage, weight, ref, clip_low, clip_high, beta):
    """One token of the policy loss: log-ratio, ratio, clipped, KL, loss and dLoss/dlogprob."""
    log_ratio = logprob - old
    ratio = tl.exp(log_ratio)
    clipped = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
    bound = tl.where(advantage > 0, 1 + clip_high, 1 - clip_low)
    still = clipped | (advantage == 0)  # an infinite ratio must not be multiplied by zero
    loss = -weight * tl.where(still, bound, ratio) * advantage
    coefficient = tl.where(still, 0.0, -weight * ratio * advantage)
    growth = _expm1(ref - logprob)
    kl = growth - (ref - logprob)
    if beta != 0:
        loss += weight * beta * kl
        coefficient -= weight * beta * growth
    return log_ratio, ratio, clipped, kl, loss, coefficient


@triton.jit
def policy_rows_kernel(
    logits, gradient, targets, old_logprob, advantage, token_weight, ref_logprob, out, C, clip_low, clip_high, beta,
    scale, cap, V: tl.constexpr, HAS_CAP: tl.constexpr, HAS_REF: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `policy_rows`: writes `out` [3, C], and the gradient if it is not 0."""
    i = tl.program_id(0)
    row = logits + i.to(tl.int64) * V
    target = tl.load(targets + i)
    m, log_total, logprob, entropy = _read_row(row, target, scale, cap, V, HAS_CAP, BLOCK)
    ref = tl.load(ref_logprob + i) if HAS_REF else float("nan")
    old, a, w = tl.load(old_logprob + i), tl.load(advantage + i), tl.load(token_weight + i)
    _, _, _, _, _, k = _token(logprob, old, a, w, ref, clip_low, clip_high, beta)
    tl.store(out + i, logprob)
    tl.store(out + C + i, entropy)
    tl.store(out + 2 * C + i, k)
    if GRADIENT and k != 0:
        _write_row(
            row, gradient + i.to(tl.int64) * V, target, scale, cap, m, log_total, logprob, entropy, k, 0.0, V,
            HAS_CAP, False, BLOCK,
        )  # fmt: skip


@triton.jit
def logprob_rows_kernel(
    logits, targets, out, C, scale, cap, V: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of `logprob_rows`: writes `out` [2, C]."""
    i = tl.program_id(0)
    target = tl.load(targets + i)
    _, _, logprob, entropy = _read_row(logits + i.to(tl.int64) * V, target, scale, cap, V, HAS_CAP, BLOCK)
    tl.store(out + i, logprob)
    tl.store(out + C + i, entropy)


@triton.jit
def logprob_rows_grad_kernel(
    logits, gradient, targets, grad_logprob, grad_entropy, scale, cap, V: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `logprob_rows_grad`."""
    i = tl.program_id(0)
    row = logits + i.to(tl.int64) * V
    target = tl.load(targets + i)
    m, log_total, logprob, entropy = _read_row(row, target, scale, cap, V, HAS_CAP, BLOCK)
    k = tl.load(grad_logprob + i)
    h = tl.load(grad_entropy + i) if HAS_ENTROPY else 0.0
    _write_row(
        row, gradient + i.to(tl.int64) * V, target, scale, cap, m, log_total, logprob, entropy, k, h, V, HAS_CAP,
        HAS_ENTROPY, BLOCK,
    )  # fmt: skip


@triton.jit
def _max_or_nan(x):
    return tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))


@triton.jit
def policy_loss_kernel(
    logprob, old_logprob, advantage, token_weight, ref_logprob, entropy, kept, gradient, partial, T, clip_low,
    clip_high, beta, HAS_REF: tl.constexpr, HAS_ENTROPY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One block of tokens. Its row of `partial` gets the eight sums and two maxima of ops/stats.py, and the loss."""
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = i < T
    a = tl.load(advantage + i, mask=inside, other=0.0)
    w = tl.load(token_weight + i, mask=inside, other=0.0)
    trained = (w != 0) & ((a != 0) | (beta != 0))
    lp = tl.load(logprob + i, mask=trained, other=0.0)
    old = tl.load(old_logprob + i, mask=trained, other=0.0)
    unknown = tl.full([TOKENS], float("nan"), tl.float32)
    ref = tl.load(ref_logprob + i, mask=trained, other=0.0) if HAS_REF else unknown
    ent = tl.load(entropy + i, mask=trained, other=0.0) if HAS_ENTROPY else unknown
    log_ratio, ratio, clipped, kl, loss, k = _token(lp, old, a, w, ref, clip_low, clip_high, beta)
    tl.store(kept + i, tl.where(trained, lp, float("nan")), mask=inside)
    tl.store(gradient + i, tl.where(trained, k, 0.0), mask=inside)
    finite = tl.abs(lp) < float("inf")
    row = partial + tl.program_id(0) * 11
    tl.store(row, tl.sum(trained.to(tl.float32), 0))
    tl.store(row + 1, tl.sum(tl.where(trained, w, 0.0), 0))
    tl.store(row + 2, tl.sum(tl.where(trained, ratio, 0.0), 0))
    tl.store(row + 3, tl.sum(tl.where(trained, log_ratio, 0.0), 0))
    tl.store(row + 4, tl.sum((trained & clipped).to(tl.float32), 0))
    tl.store(row + 5, tl.sum(tl.where(trained, kl, 0.0), 0))
    tl.store(row + 6, tl.sum(tl.where(trained, ent, 0.0), 0))
    tl.store(row + 7, tl.sum((trained & (finite == 0)).to(tl.float32), 0))
    tl.store(row + 8, _max_or_nan(tl.where(trained, ratio, 0.0)))
    tl.store(row + 9, _max_or_nan(tl.where(trained, tl.abs(log_ratio), 0.0)))
    tl.store(row + 10, tl.sum(tl.where(trained, loss, 0.0), 0))


def _sizes(logits: Tensor, targets: Tensor, gradient: Tensor | None = None) -> tuple[int, int]:
    """C and V, after checks."""
    assert logits.is_contiguous() and logits.dtype in (torch.float32, torch.bfloat16)
    assert targets.shape == logits.shape[:1]
    assert gradient is None or (gradient.is_contiguous() and gradient.shape == logits.shape)
    return logits.shape[0], logits.shape[1]


def policy_rows(
    logits: Tensor, gradient: Tensor | None, targets: Tensor, old_logprob: Tensor, advantage: Tensor,
    token_weight: Tensor, ref_logprob: Tensor | None, clip_low: float, clip_high: float, beta: float,
    temperature: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """[3, C]: logprob, entropy, dLoss/dlogprob; dLoss/d(head output) is written to `gradient` [C, V] in rows where the
    last is not 0.
    """
    c, v = _sizes(logits, targets, gradient)
    out = torch.empty((3, c), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        policy_rows_kernel[(c,)](
            logits, gradient, targets, old_logprob, advantage, token_weight, ref_logprob, out, c, clip_low, clip_high,
            beta, 1 / temperature, softcap or 1.0, V=v, HAS_CAP=softcap is not None,
            HAS_REF=ref_logprob is not None, GRADIENT=gradient is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(v)), num_warps=WARPS,
        )  # fmt: skip
    return out


def logprob_rows(logits: Tensor, targets: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """[2, C]: logprob, entropy."""
    c, v = _sizes(logits, targets)
    out = torch.empty((2, c), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        logprob_rows_kernel[(c,)](
            logits, targets, out, c, 1 / temperature, softcap or 1.0, V=v, HAS_CAP=softcap is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(v)), num_warps=WARPS,
        )  # fmt: skip
    return out


def logprob_rows_grad(
    logits: Tensor, gradient: Tensor, targets: Tensor, grad_logprob: Tensor, grad_entropy: Tensor | None,
    temperature: float, softcap: float | None,
) -> None:  # fmt: skip
    """Writes the gradient of sum grad_logprob logprob + grad_entropy entropy to `gradient` [C, V]."""
    c, v = _sizes(logits, targets, gradient)
    with torch.cuda.device_of(logits):
        logprob_rows_grad_kernel[(c,)](
            logits, gradient, targets, grad_logprob, grad_entropy, 1 / temperature, softcap or 1.0,
            V=v, HAS_CAP=softcap is not None, HAS_ENTROPY=grad_entropy is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(v)), num_warps=WARPS,
        )  # fmt: skip


def policy_loss_rows(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, token_weight: Tensor, ref_logprob: Tensor | None,
    entropy: Tensor | None, clip_low: float, clip_high: float, beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss [], logprob with NaN if untrained [T], dLoss/dlogprob [T], stats [10] float64."""
    t = logprob.shape[0]
    blocks = triton.cdiv(t, TOKENS)
    kept, gradient = torch.empty_like(logprob), torch.empty_like(logprob)
    partial = torch.zeros((blocks + 1, 11), dtype=torch.float32, device=logprob.device)  # one more row: never empty
    if blocks:
        with torch.cuda.device_of(logprob):
            policy_loss_kernel[(blocks,)](
                logprob, old_logprob, advantage, token_weight, ref_logprob, entropy, kept, gradient, partial, t,
                clip_low, clip_high, beta, HAS_REF=ref_logprob is not None, HAS_ENTROPY=entropy is not None,
                TOKENS=TOKENS,
            )  # fmt: skip
    sums = partial.sum(0, dtype=torch.float64)
    stats = torch.cat([sums[:8], partial[:, 8:10].amax(0).double()])
    return sums[10].float(), kept, gradient, stats
