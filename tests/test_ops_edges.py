"""Numerical edge cases: autocast, scaled losses, infinite ratios, invalid rows, masked labels."""

import math
from typing import Any

import pytest
import torch
from ops_cases import inputs, small_chunks

from dwrl_fast import ops
from dwrl_fast.errors import UserError
from dwrl_fast.ops import extension

pytestmark = pytest.mark.skipif(extension.problem() is not None, reason="the C++ operators are not built")

T, H, V = 29, 16, 301


def case(**options: Any) -> dict[str, Any]:
    return inputs((T, H, V), torch.float32, **options)


def policy(x: dict[str, Any], **options: Any) -> ops.PolicyLoss:
    names = ("hidden", "weight", "targets", "old_logprob", "advantage", "token_weight")
    return ops.linear_policy_loss(*(x[k] for k in names), bias=x["bias"], **options)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("operator", ["linear_policy_loss", "linear_logprob", "vocab", "yes_no"])
def test_autocast_narrows_hidden_and_nothing_else(operator: str, inside: bool) -> None:
    """With a float32 master under autocast, results equal those of a bfloat16 `hidden` without autocast bit for bit,
    over several chunks.
    """
    x = case()
    head = x["weight"], x["bias"]

    def value(hidden: torch.Tensor) -> torch.Tensor:
        if operator == "linear_policy_loss":
            return policy(x | {"hidden": hidden}).loss * 1.5
        if operator == "linear_logprob":
            lp, entropy = ops.linear_logprob(hidden, head[0], x["targets"], bias=head[1], return_entropy=True)
            return (lp * x["advantage"] + entropy * x["token_weight"]).sum()
        score = ops.yes_no_logprob(hidden, head[0], V - 1, 0, bias=head[1], normalization=operator)
        return (score * x["advantage"]).sum()

    with small_chunks():
        narrow = x["hidden"].detach().bfloat16().requires_grad_()
        expected = value(narrow)
        want = torch.autograd.grad(expected, (narrow, *head))
        with torch.autocast("cpu", torch.bfloat16):
            found = value(x["hidden"])
            if inside:
                got = torch.autograd.grad(found, (x["hidden"], *head))
        if not inside:
            got = torch.autograd.grad(found, (x["hidden"], *head))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        if inside and operator == "yes_no":  # autograd multiplies the two columns itself, and autocast affects that
            torch.testing.assert_close(one, other.float(), rtol=0.02, atol=0.02)
        else:
            assert torch.equal(one, other.float())


def test_autocast_comes_before_the_checks() -> None:
    x = case()
    with torch.autocast("cpu", torch.bfloat16):
        ops.linear_logprob(x["hidden"], x["weight"].bfloat16(), x["targets"])
    with torch.autocast("cpu", torch.float16), pytest.raises(UserError, match=r"hidden is torch.float16.*autocast too"):
        policy(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_loss_scales_its_gradients_once_rounded(dtype: Any) -> None:
    x = inputs((T, H, V), dtype)
    plain, third = (torch.autograd.grad(policy(x).loss * s, x["weight"])[0] for s in (1, 1 / 3))
    scale = torch.tensor(1 / 3)
    assert torch.equal(third, (plain.float() * scale).to(dtype))
    assert scale.bfloat16() != scale


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("gap", [50.0, 90.0, 1000.0])
def test_a_still_row_with_an_infinite_ratio_has_no_gradient(backend: str, gap: float) -> None:
    """The row is clipped from above, or has advantage 0 and a KL term. Zero times an infinite ratio must be zero."""
    lp = torch.full((2,), -1.0, requires_grad=True)
    old, ones = lp.detach() - gap, torch.ones(2)
    clipped = ops.policy_loss(lp, old, ones, ones, backend=backend)
    assert clipped.loss.item() == pytest.approx(-2.4)
    assert (torch.autograd.grad(clipped.loss, lp)[0] == 0).all()
    kl: dict[str, Any] = {"ref_logprob": lp.detach() + 0.1, "beta": 0.5}
    beside = ops.policy_loss(lp, old, torch.tensor([1.0, 0.0]), ones, backend=backend, **kl)
    assert beside.loss.isfinite()
    assert torch.autograd.grad(beside.loss, lp)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_only_logprob_is_differentiated(backend: str) -> None:
    lp, old, a, w, ref = (torch.randn(5, requires_grad=True) for _ in range(5))
    loss = ops.policy_loss(lp, old, a, w, ref_logprob=ref, beta=0.1, backend=backend).loss
    found = torch.autograd.grad(loss, (lp, old, a, w, ref), allow_unused=True)
    assert [g is None for g in found] == [False, True, True, True, True]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_an_invalid_row_makes_the_maxima_nan(backend: str, where: int) -> None:
    lp, ones = torch.zeros(3), torch.ones(3)
    lp[where] = torch.nan
    stats = ops.read_stats(ops.policy_loss(lp, ones, ones, ones, backend=backend).stats)
    assert stats["invalid"] == 1
    assert math.isnan(stats["ratio_max"])
    assert math.isnan(stats["log_ratio_abs_max"])


@pytest.mark.parametrize("masked", [[3], [5], [3, 5]], ids=["yes", "no", "both"])
@pytest.mark.parametrize("normalization", ["vocab", "yes_no"])
def test_mass_of_masked_labels(masked: list[int], normalization: str) -> None:
    x = case(size=4)
    x["bias"] = x["bias"].detach().index_fill(0, torch.tensor(masked), -torch.inf)
    (score, mass), (plain, same) = (
        ops.yes_no_logprob(
            x["hidden"], x["weight"], 3, 5, bias=x["bias"], normalization=normalization, return_mass=True, backend=b
        )
        for b in ("cpu", "reference")
    )
    torch.testing.assert_close(mass, same)
    torch.testing.assert_close(score, plain, equal_nan=True)
