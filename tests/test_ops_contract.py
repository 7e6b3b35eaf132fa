"""Guarantees of the operators besides numbers: skipped rows, frozen inputs, one derivative, errors, determinism."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_cases import every_operator, in_float64, inputs, results, small_chunks

from bench.harness import matrix_products
from dwrl_fast import ops
from dwrl_fast.errors import UserError
from dwrl_fast.log import info_once, warn_once
from dwrl_fast.ops import extension, oracle, products

pytestmark = pytest.mark.skipif(extension.problem() is not None, reason="the C++ operators are not built")

T, H, V = 29, 16, 301


def case(**options: Any) -> dict[str, Any]:
    return inputs((T, H, V), torch.float32, **options)


def policy(x: dict[str, Any], **options: Any) -> ops.PolicyLoss:
    names = ("hidden", "weight", "targets", "old_logprob", "advantage", "token_weight")
    return ops.linear_policy_loss(*(x[k] for k in names), bias=x["bias"], **options)


def product_rows(run: Callable[[], object]) -> float:
    """The number of rows in all products of [T, H] and [H, V], transposed or not."""
    return matrix_products(run, unit=H * V)["rows"]


def test_linear_policy_loss_takes_three_products_of_the_trained_rows() -> None:
    x = case()
    x["old_logprob"] = policy(x).logprob.nan_to_num()
    trained = oracle.trained_rows(x["advantage"], x["token_weight"], 0.0).sum().item()
    assert trained < T
    with small_chunks():
        assert product_rows(lambda: policy(x).loss.backward()) == 3 * trained


def test_clipped_rows_take_one_product() -> None:
    x = case()
    r = policy(x)
    stats = ops.read_stats(r.stats)
    clipped, trained = stats["clipped"] * stats["tokens"], stats["tokens"]
    assert 0 < clipped < trained
    assert product_rows(lambda: policy(x).loss.backward()) == pytest.approx(3 * trained - 2 * clipped)


def test_all_rows_clipped() -> None:
    x = case()
    x["old_logprob"] = torch.where(x["advantage"] > 0, -100.0, 100.0)
    r = policy(x)
    gradients = torch.autograd.grad(r.loss, (x["hidden"], x["weight"], x["bias"]))
    assert all((g == 0).all() for g in gradients)
    assert ops.read_stats(r.stats)["clipped"] == 1


def test_linear_logprob_takes_four_products() -> None:
    x = case()
    a = x["advantage"].clone().fill_(1)

    def run() -> None:
        (ops.linear_logprob(x["hidden"], x["weight"], x["targets"]) * a).sum().backward()

    with small_chunks():
        assert product_rows(run) == 4 * T


def test_yes_no_takes_two_columns() -> None:
    x = case()
    run = lambda: ops.yes_no_logprob(x["hidden"], x["weight"], 3, 5, normalization="yes_no").sum().backward()  # noqa: E731
    assert product_rows(run) == pytest.approx(3 * T * 2 / V)  # forward, dHidden, dWeight of two columns


@pytest.mark.parametrize(
    ("frozen", "products"), [(("weight", "bias"), 2), (("hidden", "bias"), 2), (("hidden", "weight", "bias"), 1)]
)
def test_what_is_frozen_costs_no_product(frozen: Any, products: Any) -> None:
    x = case()
    x["old_logprob"] = policy(x).logprob.nan_to_num()
    full = policy(x)
    full.loss.backward()
    x |= {k: x[k].detach() for k in frozen}
    trained = int(full.stats[0])

    def run() -> None:
        r = policy(x)
        if r.loss.requires_grad:
            r.loss.backward()

    assert product_rows(run) == products * trained
    assert torch.equal(policy(x).loss, full.loss)
    assert all(x[k].grad is None for k in frozen)


def test_no_grad_forms_no_gradient() -> None:
    x = case()
    with torch.no_grad():
        assert product_rows(lambda: policy(x)) == oracle.trained_rows(x["advantage"], x["token_weight"], 0.0).sum()


def test_skipped_rows_may_hold_anything() -> None:
    x = case()
    want = policy(x)
    want_grad = torch.autograd.grad(want.loss, x["hidden"])[0]
    skipped = ~oracle.trained_rows(x["advantage"], x["token_weight"], 0.0)
    assert skipped.any()
    with torch.no_grad():
        x["hidden"][skipped] = torch.nan
    x["targets"][skipped] = -100
    x["old_logprob"][skipped] = torch.nan
    r = policy(x)
    grad = torch.autograd.grad(r.loss, x["hidden"])[0]
    assert torch.equal(r.loss, want.loss)
    assert torch.equal(grad, want_grad)
    assert (grad[skipped] == 0).all()
    assert torch.equal(r.logprob.isnan(), skipped)
    torch.testing.assert_close(r.stats, want.stats, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rows(backend: Any) -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    none, targets = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    r = ops.linear_policy_loss(hidden, weight, targets, none, none, none, backend=backend)
    r.loss.backward()
    assert r.loss == 0
    assert r.logprob.shape == (0,)
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0
    logprob, entropy = ops.linear_logprob(hidden, weight, targets, return_entropy=True, backend=backend)
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == entropy.shape == (0,)
    assert ops.yes_no_logprob(hidden, weight, 0, 1, backend=backend).shape == (0,)
    assert ops.policy_loss(none, none, none, none, backend=backend).loss == 0


def test_logprob_and_stats_are_constants() -> None:
    r = policy(case())
    assert r.loss.requires_grad
    assert not r.logprob.requires_grad
    assert not r.stats.requires_grad


@pytest.mark.parametrize("name", ["linear_policy_loss", "policy_loss", "linear_logprob", "entropy", "yes_no_logprob"])
def test_a_double_backward_raises(name: Any) -> None:
    x = case()
    head = x["hidden"], x["weight"]
    tokens = x["old_logprob"], x["advantage"], x["token_weight"]
    value = {
        "linear_policy_loss": lambda: policy(x).loss,
        "policy_loss": lambda: ops.policy_loss(x["hidden"][:, 0], *tokens).loss,
        "linear_logprob": lambda: ops.linear_logprob(*head, x["targets"]).sum(),
        "entropy": lambda: ops.linear_logprob(*head, x["targets"], return_entropy=True)[1].sum(),
        "yes_no_logprob": lambda: ops.yes_no_logprob(*head, 1, 2).sum(),
    }[name]()
    (gradient,) = torch.autograd.grad(value, x["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|no autograd formula"):
        torch.autograd.grad(gradient.square().sum() + x["hidden"].square().sum(), x["hidden"])


def test_a_float32_master_gets_an_unrounded_gradient() -> None:
    """With a bfloat16 computation and a float32 weight, the weight's gradient must not be rounded to bfloat16."""
    x = case(bias=False)
    x["hidden"] = x["hidden"].detach().bfloat16().requires_grad_()
    gradient = torch.autograd.grad(policy(x).loss, x["weight"])[0]
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())
    with small_chunks():
        in_chunks = torch.autograd.grad(policy(x).loss, x["weight"])[0]
    torch.testing.assert_close(in_chunks, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprob_is_never_above_zero(dtype: Any) -> None:
    """If one logit dominates, the target's logit must be rounded exactly as in the normaliser."""
    for seed in range(20):
        x = inputs((17, 64, 503), dtype, size=60, seed=seed)
        top = (x["hidden"].float() @ x["weight"].float().t() + x["bias"].float()).argmax(-1)
        logprob, entropy = ops.linear_logprob(x["hidden"], x["weight"], top, bias=x["bias"], return_entropy=True)
        assert (logprob <= 0).all()
        assert (entropy >= -1e-6).all()


def test_infinities_and_nan_pass_through() -> None:
    weight, hidden = torch.eye(4), torch.ones(1, 4)
    for value, alive in ((-torch.inf, True), (torch.nan, False), (torch.inf, False)):
        bias = torch.tensor([0.0, value, 0.0, 0.0])
        logprob, entropy = ops.linear_logprob(hidden, weight, torch.tensor([0]), bias=bias, return_entropy=True)
        assert bool(logprob.isfinite().all() & entropy.isfinite().all()) == alive, value
    ones = torch.ones(1)
    r = ops.linear_policy_loss(hidden * torch.nan, weight, torch.tensor([0]), -ones, ones, ones)
    assert ops.read_stats(r.stats)["invalid"] == 1


@every_operator
def test_chunks_are_fixed_and_a_hundred_repeats_are_equal(operator: str, options: dict) -> None:
    x = inputs((301, 48, 1003), torch.float32, softcap=20.0)
    with small_chunks(64):
        first = results(operator, x, "cpu", **options)
        for _ in range(100):
            again = results(operator, x, "cpu", **options)
            assert all(torch.equal(again[k].nan_to_num(), first[k].nan_to_num()) for k in first)


def test_threads_do_not_change_the_row_work() -> None:
    n = torch.get_num_threads()
    logits = torch.randn(5000, 33)
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            a = torch.randn(5000, generator=torch.Generator().manual_seed(1))
            lp = ops.linear_logprob(logits, torch.eye(33), torch.arange(5000) % 33)
            found.append(ops.policy_loss(lp, lp - a / 9, a, a.abs()).loss)
    finally:
        torch.set_num_threads(n)
    assert torch.equal(*found)


def test_gradients_accumulate_over_calls_and_chunks() -> None:
    x = case()
    policy(x).loss.backward()
    whole = x["weight"].grad.clone()
    x["weight"].grad = x["hidden"].grad = x["bias"].grad = None
    for rows in torch.arange(T).split(7):
        part = x | {k: x[k][rows] for k in ("targets", "old_logprob", "advantage", "token_weight", "hidden")}
        policy(part).loss.backward()
    torch.testing.assert_close(x["weight"].grad, whole, rtol=1e-5, atol=1e-6)


def test_several_calls_before_one_backward() -> None:
    x = case()
    y = case(seed=1) | {k: x[k] for k in ("hidden", "weight", "bias")}
    separate = [torch.autograd.grad(policy(z).loss, x["weight"])[0] for z in (x, y)]
    together = torch.autograd.grad(policy(x).loss + 2 * policy(y).loss, x["weight"])[0]
    torch.testing.assert_close(together, separate[0] + 2 * separate[1], rtol=1e-6, atol=1e-7)


def test_backward_twice_through_a_retained_graph() -> None:
    x = case()
    loss = policy(x).loss
    first = torch.autograd.grad(loss, x["weight"], retain_graph=True)[0].clone()
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(x["weight"].grad, 3 * first)
    assert torch.equal(torch.autograd.grad(loss, x["weight"])[0], first)


def test_tied_weights() -> None:
    """The embedding is also the head. The gradients of both uses are added."""
    table = torch.randn(V, H, requires_grad=True)
    ids = torch.arange(T)
    x = case(bias=False)

    def total(backend: str) -> torch.Tensor:
        r = ops.linear_policy_loss(
            table[ids], table, x["targets"], x["old_logprob"], x["advantage"], x["token_weight"], backend=backend
        )
        return torch.autograd.grad(r.loss, table)[0]

    torch.testing.assert_close(total("cpu"), total("reference"), rtol=1e-4, atol=1e-5)


def test_stats_combine_like_one_batch() -> None:
    x = case()
    whole = policy(x).stats
    parts = []
    for rows in torch.arange(T).split(7):
        keys = ("targets", "old_logprob", "advantage", "token_weight", "hidden")
        parts.append(policy(x | {k: x[k][rows] for k in keys}).stats)
    torch.testing.assert_close(ops.combine_stats(parts), whole, equal_nan=True, rtol=1e-6, atol=1e-6)
    read = ops.read_stats(whole)
    assert read["tokens"] == oracle.trained_rows(x["advantage"], x["token_weight"], 0.0).sum()
    assert 0 < read["entropy"] < torch.tensor(V).log()
    assert read["ratio_max"] == pytest.approx(torch.tensor(0.6).exp().item(), rel=1e-3)


BAD: dict[str, dict[str, Any]] = {
    "hidden is .*float16.*use bfloat16": {"hidden": torch.zeros(T, H, dtype=torch.float16)},
    r"hidden is \[1, 29, 16\]; expected \[T, H\]": {"hidden": torch.zeros(1, T, H)},
    r"weight is \[301, 15\]; expected \[V, H = 16\]": {"weight": torch.zeros(V, 15)},
    "weight is torch.float64": {"weight": torch.zeros(V, H, dtype=torch.float64)},
    "bias is torch.float64; expected hidden's torch.float32": {"bias": torch.zeros(V, dtype=torch.float64)},
    "bias is on meta": {"bias": torch.zeros(V, device="meta")},
    r"weight is \[0, 16\].*above 0": {"weight": torch.zeros(0, H), "bias": None},
    r"bias is \[300\]; expected \[V = 301\]": {"bias": torch.zeros(V - 1)},
    r"targets is \[28\]; expected \[T = 29\]": {"targets": torch.zeros(T - 1, dtype=torch.int64)},
    "targets is torch.int32": {"targets": torch.zeros(T, dtype=torch.int32)},
    "targets hold 0 to 301; expected 0 to 300": {"targets": torch.arange(T).clamp(0, 1) * V},
    r"advantage is \[29, 1\]; expected \[T = 29\]": {"advantage": torch.zeros(T, 1)},
}


@pytest.mark.parametrize("message", BAD, ids=lambda m: m[:32])
def test_errors_name_the_argument(message: Any) -> None:
    x = case() | BAD[message]
    with pytest.raises(UserError, match=f"linear_policy_loss: {message}"):
        policy(x)


def test_errors_name_the_option() -> None:
    x = case()
    for options, message in (
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": math.inf}, "softcap is inf; it must be finite"),
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"clip_high": math.nan}, "clip_high is nan"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"beta": 0.1}, "needs ref_logprob"),
        ({"backend": "gpu"}, "backend is 'gpu'; it can be auto, reference, cpu, triton"),
        ({"backend": "triton"}, "cannot run: the tensors are on cpu"),
    ):
        with pytest.raises(UserError, match=message):
            policy(x, **options)
    bad: list[tuple[dict[str, Any], str]] = [({"yes_id": V}, "yes_id is 301"), ({"normalization": "no"}, "'no'")]
    bad.append(({"yes_id": 1}, "yes_id and no_id are both 1"))
    for options, message in bad:
        with pytest.raises(UserError, match=message):
            ops.yes_no_logprob(x["hidden"], x["weight"], **({"yes_id": 0, "no_id": 1} | options))
    with pytest.raises(UserError, match=r"scores is \[3\]; expected \[P, K, N\]"):
        ops.preference_weights(lambda m: m.sum(-1), torch.zeros(3))
    with pytest.raises(UserError, match=r"scores is \[2, 2, 0\]; expected \[P, K, N\], K and N above 0"):
        ops.preference_weights(lambda m: m.sum(-1), torch.zeros(2, 2, 0))
    with pytest.raises(UserError, match=r"scores_rejected is \[3, 4\]; expected \[B, N\]"):
        ops.dual_weights(torch.zeros(2, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("operator", ["linear_logprob", "yes_no_logprob", "linear_policy_loss"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_operator_checks_its_head(operator: str, backend: Any) -> None:
    """Each operator checks it, and its message names that operator."""
    x = case() | {"weight": torch.zeros(V, H + 1)}
    run: dict[str, Callable[[], object]] = {
        "linear_logprob": lambda: ops.linear_logprob(x["hidden"], x["weight"], x["targets"], backend=backend),
        "yes_no_logprob": lambda: ops.yes_no_logprob(x["hidden"], x["weight"], 0, 1, backend=backend),
        "linear_policy_loss": lambda: policy(x, backend=backend),
    }
    with pytest.raises(UserError, match=f"^{operator}: weight is "):
        run[operator]()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_only_the_loss_holds_a_graph(backend: Any) -> None:
    """Otherwise the stats or log-probs would keep the graphs of all micro-batches in memory."""
    r = policy(case(), backend=backend)
    assert r.loss.requires_grad and not r.stats.requires_grad and not r.logprob.requires_grad


def test_auto_logs_its_choice_once(caplog: Any) -> None:
    info_once.cache_clear()
    with caplog.at_level(logging.INFO, "dwrl_fast"):
        for _ in range(3):
            policy(case())
    [record] = caplog.records
    instructions = extension.instruction_set()
    assert record.getMessage() == f"linear_policy_loss on cpu in torch.float32: backend cpu ({instructions})"


def test_a_missing_extension_is_said_with_the_command(caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(extension, "problem", lambda: "dwrl_fast runs WITHOUT its C++ operators: ... pip install")
    info_once.cache_clear()
    warn_once.cache_clear()
    x = case()
    with caplog.at_level(logging.INFO, "dwrl_fast"):
        for _ in range(3):
            policy(x)
    missing, fallback = caplog.records
    assert missing.levelname == fallback.levelname == "WARNING"
    assert "pip install" in missing.getMessage()
    assert "linear_policy_loss on cpu in torch.float32: backend reference (cpu cannot run" in fallback.getMessage()
    with pytest.raises(UserError, match=r"backend 'cpu' cannot run: .*pip install"):
        policy(x, backend="cpu")


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_operators_for_another_pytorch_are_refused(backend: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.1+cu199")
    theirs = r"compiled for PyTorch \d+\.\d+, and this is PyTorch 2\.99\.1\+cu199"
    with pytest.raises(UserError, match=rf"(?s)^linear_policy_loss: .*{theirs}.*pip install 'torch==.*--no-build-isol"):
        policy(case(), backend=backend)


def test_policy_loss_is_linear_policy_loss_of_given_logprobs() -> None:
    x = in_float64(case())
    r = policy(x)
    logprob = ops.linear_logprob(x["hidden"], x["weight"], x["targets"], bias=x["bias"])
    same = ops.policy_loss(logprob, x["old_logprob"], x["advantage"], x["token_weight"])
    torch.testing.assert_close(same.loss, r.loss)
    torch.testing.assert_close(same.logprob, r.logprob, equal_nan=True)
    one, two = (torch.autograd.grad(loss, x["weight"])[0] for loss in (r.loss, same.loss))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, True), (False, True, False), (False, False, False)]
)
def test_gradients_that_nobody_needs_are_empty(needs: tuple[bool, bool, bool]) -> None:
    """The pass and its description for tracing agree: shape, dtype, and 0 elements if there is no gradient."""
    hidden, weight, bias = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    head = products.Products(hidden, weight, bias, needs)
    for index in head.split(torch.arange(5)):
        for _, logits, gradient in head.chunks(hidden[index]):
            assert (gradient is None) == (not any(needs))
            logits.normal_()
        if any(needs):
            head.backward(hidden[index], index, torch.ones(len(index), dtype=torch.bool))
    shapes = [(5, 3), (7, 3), (7,)]
    expected = [(shape if need else (0,), torch.float32) for shape, need in zip(shapes, needs, strict=True)]
    for found in (head.gradients(), products.empty_gradients(hidden, weight, bias, needs)):
        assert [(tuple(x.shape), x.dtype) for x in found] == expected
