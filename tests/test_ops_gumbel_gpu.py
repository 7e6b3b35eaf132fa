"""The Triton kernel of gumbel_pick on a GPU, or through Triton's interpreter, which test_ops_triton.py starts."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from dwrl_fast.kernels import gumbel  # noqa: E402
from torch import Tensor  # noqa: E402

from dwrl_fast import ops  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
SIZES = [1, 5, 97, 2050] if INTERPRETED else [1, 2, 5, 97, 4 * gumbel.BLOCK, 32003, 151936]


def keys_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pick(logprob: Tensor, keys: Tensor, position: int, backend: str = "triton") -> Tensor:
    return ops.gumbel_pick(logprob, keys, torch.full_like(keys, position), backend=backend)


@pytest.mark.parametrize("v", SIZES)
def test_it_draws_what_the_definition_draws(v: int) -> None:
    """An ulp in a logarithm may exchange two tokens with almost equal values. This may happen in one draw at most."""
    rows = 20 if INTERPRETED else 300
    logprob = (4 * torch.randn(rows, v, generator=torch.Generator().manual_seed(v))).log_softmax(-1).to(DEVICE)
    found = [
        torch.stack([pick(logprob, keys_of(rows), t, backend) for t in (0, 1, 2**32 - 1)])
        for backend in ("triton", "reference")
    ]
    assert (found[0] != found[1]).sum() <= 1
    assert int(found[0].min()) >= 0 and int(found[0].max()) < v


@triton.jit
def noise_kernel(bits, found, COUNT: tl.constexpr):  # type: ignore
    i = tl.arange(0, COUNT)
    tl.store(found + i, gumbel._noise(tl.load(bits + i)))


def test_noise_where_a_rare_token_wins() -> None:
    """Compared with float64 over the whole range of w. Rare tokens are drawn at its smallest values."""
    bits = torch.cat([torch.arange(2048), (torch.arange(4096) << 20) + 77, 2**32 - 1 - torch.arange(2048)]).to(DEVICE)
    found = torch.empty(len(bits), device=DEVICE)
    noise_kernel[(1,)](torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32), found, COUNT=len(bits))
    w = (bits.float() * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24).double()
    exact = -(-torch.log1p(-w)).log()
    # Relative: an ulp of the inner logarithm. Absolute: float32's rounding of the outer logarithm, which is at most 23.
    torch.testing.assert_close(found.double(), exact, rtol=2**-22, atol=2**-20)


def test_what_is_impossible_and_what_is_certain() -> None:
    rows = 20 if INTERPRETED else 1000
    logprob = torch.full((rows, 9), -torch.inf, device=DEVICE)
    logprob[:, 4] = 0
    assert (pick(logprob, keys_of(rows), 0) == 4).all()
    logprob[:, 7] = torch.nan
    assert (pick(logprob, keys_of(rows), 0) == 7).all()
    assert pick(logprob[:0], keys_of(0), 0).shape == (0,)


def test_a_row_is_drawn_alike_in_any_batch_and_from_any_strides() -> None:
    rows = 16 if INTERPRETED else 64
    logprob = (3 * torch.randn(rows, 333, generator=torch.Generator().manual_seed(0))).log_softmax(-1).to(DEVICE)
    whole = pick(logprob, keys_of(rows), 5)
    each = [pick(logprob[i : i + 1], keys_of(rows)[i : i + 1], 5) for i in range(rows)]
    assert torch.equal(torch.cat(each), whole)
    assert torch.equal(pick(logprob.t().contiguous().t(), keys_of(rows), 5), whole)


@pytest.mark.skipif(INTERPRETED, reason="too many rows for the interpreter")
def test_draws_follow_softmax() -> None:
    """A chi-square test over keys, with tokens as rare as 1 in 100,000."""
    n = 2_000_000
    p = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.008, 0.00199, 0.00001], dtype=torch.float64, device=DEVICE)
    drawn = pick(p.log().float().expand(n, -1), keys_of(n), 3)
    seen, expected = torch.bincount(drawn, minlength=7).double(), p * n
    assert ((seen - expected).square() / expected).sum() < 6 + 4 * 12**0.5
