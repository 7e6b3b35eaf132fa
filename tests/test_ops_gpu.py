"""The Triton kernels and the operators over them on a GPU, against float64.

Their bodies run on the CPU too, on smaller shapes, through Triton's interpreter: test_ops_triton.py starts that.
"""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from dwrl_fast.kernels import rows, yes_no
from dwrl_fast.kernels.scaled import scaled
from ops_cases import assert_accurate, every_operator, in_float64, inputs, on_device, results, small_chunks
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.ops import clipped, logprob, oracle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
on_cuda = pytest.mark.skipif(INTERPRETED, reason="the interpreter has neither streams nor a compiler")
on_large_shapes = pytest.mark.skipif(INTERPRETED, reason="test_interpreter_shapes is the same on smaller shapes")
VOCABULARIES = [1, 77, 4099] if INTERPRETED else [1, 1000, 32003, 128256, 151936]
HEADS: list[dict[str, Any]] = [{}, {"softcap": 20.0, "temperature": 1.3}]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def chunk(c: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Logits [C, V], targets [C]; old log-prob, advantage and token weight [C]. No ratio is near a clip boundary."""
    g = generator(seed)
    logits = (4 * torch.randn(c, v, generator=g, device=DEVICE)).to(dtype)
    targets = torch.randint(v, (c,), generator=g, device=DEVICE)
    log_ratio = torch.tensor([-0.6, -0.1, 0.05, 0.5], device=DEVICE)[torch.arange(c, device=DEVICE) % 4]
    old = log_probs(logits.double(), 1.0, None).gather(1, targets[:, None]).squeeze(1).float() - log_ratio
    advantage, weight = (torch.randn(c, generator=g, device=DEVICE) for _ in range(2))
    return logits, targets, (old, advantage, weight.abs())


def log_probs(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return (z / temperature).log_softmax(-1)


def assert_near(found: Tensor, exact: Tensor, within: float) -> None:
    """Assert that the relative difference in the 2-norm is at most `within`, and not NaN."""
    norm = exact.double().norm().clamp_min(1e-30)
    assert (found.double() - exact.double()).norm() / norm <= within


WITHIN = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}  # the interpreter truncates


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "narrow"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_row_kernels(v: int, dtype: torch.dtype, narrow: bool, head: dict[str, Any]) -> None:
    logits, targets, tokens = chunk(24, v, dtype)
    scaling = head.get("temperature", 1.0), head.get("softcap")
    rule = (9.0, 9.0, 0.1)
    x = logits.double().requires_grad_()
    every = log_probs(x, *scaling)
    exact = every.gather(1, targets[:, None]).squeeze(1)
    entropy = -(every.exp() * every).sum(-1)
    ref = (exact.detach() - 0.1).float()
    loss = oracle.policy_loss(
        exact, *(y.double() for y in tokens), clip_low=9.0, clip_high=9.0, ref_logprob=ref.double(), beta=0.1
    ).loss
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    kind = torch.bfloat16 if narrow else dtype

    z = logits.clone()
    gradient = torch.full_like(z, torch.nan, dtype=kind) if narrow else z
    out = rows.policy_rows(z, gradient, targets, *tokens, ref, *rule, *scaling)
    torch.testing.assert_close(out[:2].double(), torch.stack([exact, entropy]).detach(), rtol=1e-5, atol=2e-5)
    assert (out[0] <= 0).all()
    near = assert_near if v > 1 else lambda *_: None  # with one token the gradient is only rounding errors
    near(gradient, want, WITHIN[kind])

    found = rows.logprob_rows(logits, targets, *scaling)
    torch.testing.assert_close(found, out[:2])
    g_logprob, g_entropy = tokens[1], tokens[2]
    (want,) = torch.autograd.grad((exact * g_logprob + entropy * g_entropy).sum(), x)
    z = logits.clone()
    gradient = torch.full_like(z, torch.nan, dtype=kind) if narrow else z
    rows.logprob_rows_grad(z, gradient, targets, g_logprob, g_entropy, *scaling)
    near(gradient, want, 4 * WITHIN[kind])


def test_over_the_logits_as_beside_them() -> None:
    """Gradients written over the logits equal separate ones bit for bit, in every repetition: no thread of a row writes
    where another thread still has to read.
    """
    c, v = (3, 5000) if INTERPRETED else (2048, 151936)
    logits, targets, tokens = chunk(4, v, torch.float32)
    logits = logits.repeat(-(-c // 4), 1)[:c].contiguous()
    targets, tokens = targets.repeat(c)[:c].contiguous(), tuple(x.repeat(c)[:c].contiguous() for x in tokens)
    beside = torch.full_like(logits, torch.nan)
    rule = (None, 9.0, 9.0, 0.0, 1.0, None)
    out = rows.policy_rows(logits, beside, targets, *tokens, *rule)
    for _ in range(1 if INTERPRETED else 10):
        z = logits.clone()
        assert torch.equal(rows.policy_rows(z, z, targets, *tokens, *rule), out)
        assert torch.equal(z, beside)


@on_cuda
def test_more_elements_than_int32_counts() -> None:
    v = 151936
    c = 2**31 // v + 70
    if torch.cuda.mem_get_info()[0] < 2 * c * v * 4:
        pytest.skip("the GPU has too little free memory")
    _, targets, tokens = chunk(c, 64, torch.float32)
    logits = torch.empty(c, v, device=DEVICE).normal_(generator=generator())
    last = logits[-3:].double().requires_grad_()
    lp = log_probs(last, 1.0, None).gather(1, targets[-3:, None]).squeeze(1)
    gradient = torch.empty_like(logits, dtype=torch.bfloat16)
    tokens = (torch.full_like(tokens[0], -12.0), *tokens[1:])
    out = rows.policy_rows(logits, gradient, targets, *tokens, None, 1e9, 1e9, 0.0, 1.0, None)
    torch.testing.assert_close(out[0, -3:].double(), lp.detach(), rtol=1e-5, atol=1e-5)
    loss = oracle.policy_loss(lp, *(x[-3:].double() for x in tokens), clip_low=1e9, clip_high=1e9).loss
    assert_near(gradient[-3:], torch.autograd.grad(loss, last)[0], 2.0**-8)


@pytest.mark.parametrize("t", [0, 1, 2500] if INTERPRETED else [0, 1, 2500, 100_003])
def test_policy_loss(t: int) -> None:
    g = generator()
    lp, old, a, w, ref = (torch.randn(t, generator=g, device=DEVICE) for _ in range(5))
    a[::7], w[3::11] = 0, 0
    lp.requires_grad_()
    exact = lp.detach().double().requires_grad_()
    for options in ({}, {"ref_logprob": ref, "beta": 0.2, "entropy": -old}):
        got = ops.policy_loss(lp, old, a, w, backend="triton", **options)  # type: ignore[arg-type]
        wide = {k: x.double() if isinstance(x, Tensor) else x for k, x in options.items()}
        want = ops.policy_loss(exact, *(x.double() for x in (old, a, w)), backend="reference", **wide)  # type: ignore[arg-type]
        torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-5 * max(t, 1) ** 0.5)
        torch.testing.assert_close(got.stats, want.stats, rtol=1e-4, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=0, atol=0, equal_nan=True)
        found, right = torch.autograd.grad(got.loss, lp)[0], torch.autograd.grad(want.loss, exact)[0]
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)


@on_large_shapes
@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("t", [1, 37])
def test_operators_at_a_large_vocabulary(t: int, dtype: torch.dtype, operator: str, options: dict[str, Any]) -> None:
    for seed in range(2):
        x = on_device(inputs((t, 32, 151936), dtype, size=4, seed=seed), DEVICE)
        assert_accurate(operator, x, results(operator, x, "triton", **options), **options)


def policy_of(x: dict[str, Any], **changed: Any) -> ops.PolicyLoss:
    names = ("hidden", "weight", "targets", "old_logprob", "advantage", "token_weight")
    return ops.linear_policy_loss(*((x | changed)[k] for k in names), bias=x["bias"], backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_to_train(dtype: torch.dtype) -> None:
    x = on_device(inputs((21, 16, 1003), dtype), DEVICE)
    head = x["hidden"], x["weight"], x["bias"]
    masked = policy_of(x, token_weight=torch.zeros_like(x["token_weight"]))
    assert masked.loss == 0 and masked.logprob.isnan().all()
    for like, found in zip(head, torch.autograd.grad(masked.loss, head), strict=True):
        assert found.dtype == like.dtype and (found == 0).all()
    none = {k: x[k][:0] for k in ("targets", "old_logprob", "advantage", "token_weight")}
    empty = policy_of(x, hidden=x["hidden"].detach()[:0].requires_grad_(), **none)
    assert empty.loss == 0 and empty.logprob.shape == (0,)
    assert (torch.autograd.grad(empty.loss, x["weight"])[0] == 0).all()
    assert ops.linear_logprob(head[0][:0], head[1], none["targets"], backend="triton").shape == (0,)
    for normalization in ("vocab", "yes_no"):
        score = ops.yes_no_logprob(head[0][:0], head[1], 3, 5, normalization=normalization, backend="triton")
        assert score.shape == (0,)


def test_only_what_is_asked_for() -> None:
    """With a frozen head, frozen hidden states, or both, the loss and the remaining gradient are the same."""
    x = on_device(inputs((37, 16, 1003), torch.bfloat16), DEVICE)
    whole = policy_of(x)
    want = torch.autograd.grad(whole.loss, (x["hidden"], x["weight"]))
    for frozen, kept, gradient in (("weight", "hidden", want[0]), ("hidden", "weight", want[1])):
        some = policy_of(x, **{frozen: x[frozen].detach()})
        assert torch.equal(some.loss, whole.loss)
        assert torch.equal(torch.autograd.grad(some.loss, x[kept])[0], gradient)
    with torch.no_grad():  # another kernel, which writes no gradient and may be compiled to other fused operations
        torch.testing.assert_close(policy_of(x).loss, whole.loss, rtol=1e-6, atol=0)


@on_cuda
def test_a_float32_master_gets_the_sum_unrounded() -> None:
    x = on_device(inputs((301, 64, 4099), torch.float32, size=4), DEVICE)
    exact = in_float64(x | {"hidden": x["hidden"].detach().bfloat16(), "weight": x["weight"].detach().bfloat16()})
    exact["hidden"], exact["weight"] = (exact[k].detach().requires_grad_() for k in ("hidden", "weight"))
    with torch.autocast("cuda", torch.bfloat16), small_chunks(64):
        (master,) = torch.autograd.grad(policy_of(x).loss, x["weight"])
    narrow = policy_of(
        x, hidden=x["hidden"].detach().bfloat16(), weight=x["weight"].detach().bfloat16().requires_grad_()
    )
    assert master.dtype == torch.float32 and narrow.loss.dtype == torch.float32
    want = torch.autograd.grad(results_loss(exact), exact["weight"])[0]
    assert_near(master, want, 2.0**-8)
    assert not torch.equal(master, master.bfloat16().float())


def results_loss(x: dict[str, Any]) -> Tensor:
    names = ("hidden", "weight", "targets", "old_logprob", "advantage", "token_weight")
    return oracle.linear_policy_loss(*(x[k] for k in names), bias=x["bias"]).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_label_scores(dtype: torch.dtype) -> None:
    g = generator()
    hidden = torch.randn(70, 900, generator=g, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(40, 900, generator=g, device=DEVICE) / 30).to(dtype).requires_grad_()
    for cap in (None, 9.0):
        score = yes_no.yes_no_scores(hidden, weight, None, 3, 5, cap)
        wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        want = oracle.yes_no_logprob(*wide, 3, 5, normalization="yes_no", softcap=cap)
        assert isinstance(want, Tensor)
        torch.testing.assert_close(score.double(), want, rtol=1e-5, atol=1e-6)
        pairs = (torch.autograd.grad(y.sum(), z) for y, z in ((score, (hidden, weight)), (want, wide)))
        for found, right in zip(*pairs, strict=True):
            assert_near(found, right, WITHIN[dtype])


@pytest.mark.parametrize("shape", [(1,), (3, 37), (9, 4096)], ids=str)
def test_scaled_and_rounded_once(shape: tuple[int, ...]) -> None:
    x, scale = torch.randn(shape, generator=generator(), device=DEVICE), torch.tensor(0.3, device=DEVICE)
    found = scaled(x, scale, torch.bfloat16)
    if INTERPRETED:  # the interpreter truncates
        torch.testing.assert_close(found.float(), x * scale, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, (x * scale).bfloat16())


@on_cuda
def test_registered_operators() -> None:
    """opcheck on CUDA: schemas, fakes of the same shapes, dtypes and strides, autograd, and tracing."""
    for dtype in (torch.float32, torch.bfloat16):
        x = on_device(inputs((13, 8, 67), dtype), DEVICE)
        x = {k: y.detach() if isinstance(y, Tensor) else y for k, y in x.items()}
        head, t, a, w = (x["hidden"], x["weight"], x["bias"]), x["targets"], x["advantage"] + 9, x["token_weight"] + 0.1
        old, rule, scaling = x["old_logprob"], (0.2, 0.2, 0.1), (1.0, None)
        trained = tuple(y.clone().requires_grad_() for y in head)
        for needs in ((True, True, True), (True, False, False), (False, False, False)):
            args = (*head, t, old, a, w, old - 0.1, *rule, *scaling, *needs, "triton")
            torch.library.opcheck(clipped._linear_policy_loss, args)
        torch.library.opcheck(clipped._policy_loss, (old, old - 0.1, a, w, old, -old, *rule, "triton"))
        torch.library.opcheck(logprob._linear_logprob, (*trained, t, *scaling, True, 3, "triton"))
        asked = (True, True, False)
        torch.library.opcheck(logprob._linear_logprob_backward, (a, None, *head, t, *scaling, *asked, "triton"))
        torch.library.opcheck(yes_no._scores, (*trained, 3, 5, 9.0))


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_eager_equals_compiled(dtype: torch.dtype) -> None:
    x = on_device(inputs((13, 16, 67), dtype, softcap=20.0), DEVICE)
    old, a, w = x["old_logprob"], x["advantage"], x["token_weight"]

    def everything(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        r = ops.linear_policy_loss(hidden, weight, x["targets"], old, a, w, bias=bias, softcap=20.0)
        lp, entropy = ops.linear_logprob(hidden, weight, x["targets"], temperature=0.7, return_entropy=True)
        given = ops.policy_loss(lp, old, a, w, ref_logprob=old, beta=0.1)
        s, _ = ops.yes_no_logprob(hidden, weight, 3, 5, return_mass=True)
        return 2 * r.loss + given.loss + entropy.sum() + s.sum()

    head = x["hidden"], x["weight"], x["bias"]
    totals = everything(*head), torch.compile(everything, fullgraph=True)(*head)
    torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(y, head) for y in totals), strict=True):
        within = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(one, other, rtol=within, atol=within)


@on_cuda
@every_operator
def test_any_stream_and_equal_bits(operator: str, options: dict[str, Any]) -> None:
    x = on_device(inputs((301, 64, 4099), torch.bfloat16, size=4), DEVICE)
    with small_chunks(128):
        first = results(operator, x, "triton", **options)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [results(operator, x, "triton", **options) for _ in range(5)]
        torch.cuda.current_stream().wait_stream(stream)
    for other in found:
        for name, y in first.items():
            assert torch.equal(other[name].nan_to_num(), y.nan_to_num()), name
