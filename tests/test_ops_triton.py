"""The Triton kernels without a GPU: run by Triton's interpreter against the definition, and compiled for three GPUs.

The interpreter replaces the language while a process starts, so those tests run in a process of their own:
`test_through_the_interpreter` starts it, and in it the others do not skip.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from dwrl_fast.kernels import rows, yes_no  # noqa: E402
from ops_cases import (  # noqa: E402
    SHAPES,
    assert_accurate,
    every_operator,
    inputs,
    on_device,
    results,
    small_chunks,
)

from bench.gpu.compiled import VARIANTS, compiled  # noqa: E402
from dwrl_fast import ops  # noqa: E402
from dwrl_fast.errors import UserError  # noqa: E402
from dwrl_fast.ops import oracle, products  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="needs TRITON_INTERPRET=1: test_through_the_interpreter runs it"
)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
def test_through_the_interpreter(cache: bool) -> None:
    """cache: attention to a cache, which takes many steps."""
    if INTERPRETED:
        pytest.skip("this is the process it starts")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = [path for path in Path(__file__).parent.glob("test_ops*_gpu.py") if ("cache" in path.name) == cache]
    run = subprocess.run(
        [*command, "-k", "interpreter_ or gpu.py", *([] if cache else [__file__]), *map(str, files)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)


def check(operator: str, options: dict, shape: tuple, dtype: torch.dtype = torch.float32, **how: Any) -> None:
    for seed in range(1 if shape[2] > 1000 else 3):
        x = inputs(shape, dtype, seed=seed, **how)
        with small_chunks():
            assert_accurate(operator, x, results(operator, x, "triton", **options), **options)


@interpreted
@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_interpreter_shapes(operator: str, options: dict, dtype: torch.dtype, shape: tuple) -> None:
    check(operator, options, shape, dtype)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, bfloat16 factors give float32 logits and bfloat16 gradients."""

    def into_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> torch.Tensor:
        found = a.float() @ b.float()
        return out.add_(found) if add else out.copy_(found)

    monkeypatch.setattr(products, "_direct", lambda hidden: hidden.dtype == torch.bfloat16)
    monkeypatch.setattr(products, "_into_float32", into_float32)


@interpreted
@every_operator
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_interpreter_gradients_of_wider_logits(as_on_cuda: None, operator: str, options: dict, shape: tuple) -> None:
    check(operator, options, shape, torch.bfloat16)


@interpreted
def test_interpreter_a_narrow_gradient_is_the_wide_one_rounded() -> None:
    """With several blocks per row. The wide gradient is written over the logits."""
    g = torch.Generator().manual_seed(0)
    c, v = 3, 2 * rows.BLOCK + 77
    logits, targets = 3 * torch.randn(c, v, generator=g), torch.randint(v, (c,), generator=g)
    tokens = [torch.randn(c, generator=g) for _ in range(3)]
    z, narrow = logits.clone(), torch.full((c, v), torch.nan, dtype=torch.bfloat16)
    found = [
        rows.policy_rows(logits, gradient, targets, *tokens, None, 9.0, 9.0, 0.0, 1.0, None)
        for logits, gradient in ((logits, narrow), (z, z))
    ]
    assert torch.equal(*found)
    torch.testing.assert_close(narrow.float(), z, rtol=2**-7, atol=0)  # the interpreter truncates


def test_even_pieces() -> None:
    sizes = [products.piece_rows(n, 2048, "cuda") for n in (0, 1, 200, 2048, 2049, 2212, 8192)]
    assert sizes == [1, 1, 200, 2048, 1152, 1152, 2048]
    assert products.piece_rows(301, 16, "cuda") == 16
    for rows_, most in ((2212, 2048), (8192, 1152), (5000, 640)):
        assert -(-rows_ // products.piece_rows(rows_, most, "cuda")) == -(-rows_ // most)
    assert [products.piece_rows(n, 2048, "cpu") for n in (0, 1, 2049)] == [1, 1, 2048]


@pytest.mark.parametrize("rows_", [4096, 4097, 4200, 9300, 12800])
def test_every_chunk_of_every_block_fits_into_the_first_ones_logits(
    monkeypatch: pytest.MonkeyPatch, rows_: int
) -> None:
    """As on CUDA with bfloat16, where blocks have several chunks: 4,200 rows are blocks of 2,176 and 2,024."""
    monkeypatch.setattr(products, "piece_rows", lambda n, most, device, real=products.piece_rows: real(n, most, "cuda"))
    monkeypatch.setattr(products, "chunk_rows", lambda hidden, weight: 1024)
    monkeypatch.setattr(products, "_direct", lambda hidden: True)
    monkeypatch.setattr(products, "_into_float32", lambda a, b, out: out.copy_(a.float() @ b.float()))
    drawn = torch.Generator().manual_seed(0)  # whole numbers: their products are exact, whichever kernel computes them
    hidden, weight = (torch.randint(-8, 9, (n, 4), generator=drawn).bfloat16() for n in (rows_, 8))
    found = products.Products(hidden, weight, None, (True, True, False))
    blocks = found.split(torch.arange(rows_))
    for block in blocks:
        some = hidden[block]
        pieces = [(part, logits.clone(), gradient) for part, logits, gradient in found.chunks(some)]
        assert torch.equal(torch.cat([logits for _, logits, _ in pieces]), some.float() @ weight.float().T)
        assert all(gradient is not None and len(gradient) == len(some[part]) for part, _, gradient in pieces)
    assert len(blocks) == (1 if rows_ == 4096 else -(-rows_ // 4096))


def test_logits_take_no_more_rows_than_a_chunk_of_the_trained_ones() -> None:
    hidden, weight = torch.randn(300, 8), torch.randn(11, 8)
    with small_chunks(128):
        for trained, most in ((40, 40), (300, 128)):
            head = products.Products(hidden, weight, None, (False, False, False))
            for index in head.split(torch.arange(trained)):
                for part, logits, gradient in head.chunks(hidden[index]):
                    torch.testing.assert_close(logits, hidden[index[part]] @ weight.t())
                    assert gradient is None
            assert head.buffer is not None and head.buffer.shape == (most, 11)


@interpreted
@every_operator
@pytest.mark.parametrize("head", [{"softcap": 20.0, "temperature": 1.3}, {"temperature": 0.7}], ids=str)
def test_interpreter_heads(operator: str, options: dict, head: dict) -> None:
    check(operator, options, (21, 16, 1003), size=8, strided=True, **head)


@interpreted
@every_operator
def test_interpreter_huge_logits(operator: str, options: dict) -> None:
    check(operator, options, (40, 16, 517), size=1e4)


@interpreted
def test_interpreter_flags_what_it_cannot_raise() -> None:
    """A target outside the vocabulary gives NaN and reads no other memory. Infinities behave as in plain PyTorch."""
    logits, ones = torch.randn(4, 37), torch.ones(4)
    targets = torch.tensor([0, -1, 37, 36])
    found = rows.policy_rows(logits, None, targets, -ones, ones, ones, None, 0.2, 0.2, 0.0, 1.0, None)
    assert found[0].isnan().tolist() == [False, True, True, False]
    stats = rows.policy_loss_rows(found[0], -ones, ones, ones, None, None, 0.2, 0.2, 0.0)[3]
    assert ops.read_stats(stats)["invalid"] == 2
    for value, alive in ((-torch.inf, True), (torch.nan, False), (torch.inf, False)):
        logits[:, 5] = value
        logprob = rows.logprob_rows(logits, torch.zeros(4, dtype=torch.int64), 1.0, None)
        assert bool(logprob.isfinite().all()) == alive, value


@interpreted
def test_interpreter_logprob_is_never_above_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs((17, 64, 503), dtype, size=60)
        top = (x["hidden"].float() @ x["weight"].float().t()).argmax(-1)
        assert (ops.linear_logprob(x["hidden"], x["weight"], top, backend="triton") <= 0).all()


@interpreted
def test_interpreter_yes_no_registration() -> None:
    x = inputs((5, 24, 67), torch.float32, softcap=9.0)
    head = x["hidden"], x["weight"], x["bias"]
    torch.library.opcheck(yes_no._scores, (*head, 3, 5, 9.0))
    score = yes_no.yes_no_scores(*head, 3, 5, 9.0).sum()
    (gradient,) = torch.autograd.grad(score, x["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum() + x["hidden"].sum(), x["hidden"])


@interpreted
def test_interpreter_yes_no_reads_strides() -> None:
    x = inputs((5, 24, 67), torch.float32)
    bias = torch.randn(67, 3)[:, 1].requires_grad_()
    weight = x["weight"].detach().t().contiguous().t().requires_grad_()
    for cap in (None, 9.0):
        found = []
        for backend in ("triton", "reference"):
            score = ops.yes_no_logprob(
                x["hidden"], weight, 3, 5, bias=bias, softcap=cap, normalization="yes_no", backend=backend
            )
            found.append((score, *torch.autograd.grad(score.sum(), (x["hidden"], weight, bias))))
        torch.testing.assert_close(*found)


@interpreted
def test_interpreter_softcap_does_not_cancel_near_zero() -> None:
    """A cap far above the logits changes almost nothing. tanh computed as a difference would lose most digits."""
    logits = 1e-3 * torch.randn(4, 37, generator=torch.Generator().manual_seed(0))
    want = (1e3 * torch.tanh(logits.double() / 1e3)).log_softmax(-1)[:, 0]
    found = rows.logprob_rows(logits, torch.zeros(4, dtype=torch.int64), 1.0, 1e3)[0]
    torch.testing.assert_close(found.double(), want, rtol=0, atol=5e-7)
    x = inputs((5, 24, 67), torch.float32, size=1e-3, bias=False)
    head = x["hidden"], x["weight"]
    score = ops.yes_no_logprob(*head, 3, 5, softcap=1e3, normalization="yes_no", backend="triton")
    exact = ops.yes_no_logprob(
        head[0].double(), head[1].double(), 3, 5, softcap=1e3, normalization="yes_no", backend="reference"
    )
    torch.testing.assert_close(score.double(), exact, rtol=0, atol=2e-7)


@interpreted
def test_interpreter_still_rows_and_invalid_rows() -> None:
    lp, old, ones = torch.tensor([0.0, 0.0]), torch.tensor([-1.0, -100.0]), torch.ones(2)
    ref, advantage = torch.full((2,), 0.1), torch.tensor([1.0, 0.0])
    loss, _, gradient, stats = rows.policy_loss_rows(lp, old, advantage, ones, ref, None, 0.2, 0.2, 0.5)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert stats[8] == torch.inf
    lp[0] = torch.nan
    stats = rows.policy_loss_rows(lp, -ones, ones, ones, None, None, 0.2, 0.2, 0.0)[3]
    assert stats[7] == 1
    assert stats[8:].isnan().all()


@interpreted
def test_interpreter_mass_of_masked_labels() -> None:
    x = inputs((5, 24, 67), torch.float32)
    for masked in ([3], [5], [3, 5]):
        bias = x["bias"].detach().index_fill(0, torch.tensor(masked), -torch.inf)
        got, want = (
            ops.yes_no_logprob(x["hidden"], x["weight"], 3, 5, bias=bias, return_mass=True, backend=b)
            for b in ("triton", "reference")
        )
        torch.testing.assert_close(got, want)


@triton.jit
def randint_kernel(out, key, position, COUNT: tl.constexpr):  # type: ignore
    j = tl.arange(0, COUNT)
    words = tl.randint4x(tl.load(key), (position.to(tl.int64) << 32) | j)
    for i in tl.static_range(4):
        tl.store(out + 4 * j + i, words[i].to(tl.int64) & 0xFFFFFFFF)


@interpreted
def test_interpreter_draws_the_numbers_of_gumbel_pick() -> None:
    """Triton's random generator gives the same words, so that a sampler in Triton can use it."""
    key = torch.tensor([-0x123456789ABCDEF])
    out = torch.zeros(64, dtype=torch.int64)
    randint_kernel[(1,)](out, key, 7, COUNT=16)
    assert torch.equal(out.view(16, 4), torch.stack(oracle.philox(key, torch.arange(16), 7), -1))


@interpreted
def test_interpreter_refuses_float64() -> None:
    x = inputs((5, 8, 11), torch.float64)
    with pytest.raises(UserError, match="float64 takes backend 'reference'"):
        results("linear_logprob", x, "triton")


@pytest.mark.gpu
@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head", [{}, {"softcap": 20.0, "temperature": 1.3}], ids=str)
def test_on_a_gpu(operator: str, options: dict, dtype: torch.dtype, head: dict) -> None:
    x = on_device(inputs((301, 64, 32003), dtype, size=4, **head), "cuda")
    found = []
    for chunk in (16, 4096):
        with small_chunks(chunk):
            found.append(results(operator, x, "triton", **options))
    assert_accurate(operator, x, *found, **options)


def dtypes(variant: int) -> list[tuple[str, str]]:
    """The dtypes of logits and gradient with which a kernel is compiled."""
    kernel, constants, *_ = VARIANTS[variant]
    if "logits" not in kernel.arg_names:
        return [("fp32", "fp32")]
    written = "gradient" in kernel.arg_names and constants.get("GRADIENT", True)
    return [("fp32", "fp32"), *([("fp32", "bf16")] if written else []), ("bf16", "bf16")]


# The shared memory of a multiprocessor for one program. 80 is also compiled for consumer GPUs, which have less than an
# A100.
SHARED_KIB = {80: 99, 90: 227, 100: 227}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize(("variant", "logits", "gradient"), [(v, *d) for v in range(len(VARIANTS)) for d in dtypes(v)])
def test_compiles_without_spills(
    variant: int, capability: int, logits: str, gradient: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    found = compiled(variant, capability, logits, gradient)
    assert max(found.spill_stores, found.spill_loads) <= VARIANTS[variant].spilled
    assert found.shared <= SHARED_KIB[capability] << 10
