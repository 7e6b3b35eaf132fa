"""METHOD 2.2, points 1, 3, 4 and 6: the weights against autograd of their likelihood, in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwrl_fast import ops

shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([0.1, 3.0, 40.0])
quick = settings(max_examples=40, deadline=None, derandomize=True)


def scores(shape: tuple[int, ...], seed: int, size: float) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.logsigmoid(size * torch.randn(*shape, generator=g, dtype=torch.float64))


def marginal(s: Tensor) -> Tensor:
    return s.logsumexp(-1) - math.log(s.shape[-1])


def bradley_terry(marginals: Tensor) -> Tensor:
    return -F.logsigmoid(marginals[:, 0] - marginals[:, 1])


def plackett_luce(marginals: Tensor) -> Tensor:
    return sum(marginals[:, k:].logsumexp(-1) - marginals[:, k] for k in range(marginals.shape[1] - 1))  # type: ignore[return-value]


@quick
@given(shapes, seeds, sizes)
def test_phase_a_is_the_gradient_of_the_likelihood(shape: tuple[int, int], seed: int, size: float) -> None:
    """Point 1: -m sum (w+ s+ - w- s-), with constant m and w, has the same gradient as -log sigmoid(L+ - L-)."""
    good, bad = scores(shape, seed, size).requires_grad_(), scores(shape, seed + 1, size).requires_grad_()
    d = ops.dual_weights(good, bad)
    surrogate = -(d.misalignment * ((d.chosen * good).sum(-1) - (d.rejected * bad).sum(-1))).sum()
    exact = bradley_terry(torch.stack([marginal(good), marginal(bad)], 1)).sum()
    for one, other in zip(*(torch.autograd.grad(y, (good, bad)) for y in (surrogate, exact)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@quick
@given(shapes, seeds, sizes)
def test_dual_weights_are_the_pair_form(shape: tuple[int, int], seed: int, size: float) -> None:
    s = scores((shape[0], 2, shape[1]), seed, size)
    p, d = ops.preference_weights(bradley_terry, s), ops.dual_weights(s[:, 0], s[:, 1])
    torch.testing.assert_close(p.coefficients, torch.stack([d.misalignment, -d.misalignment], 1))
    torch.testing.assert_close(p.weights, torch.stack([d.chosen, d.rejected], 1))
    torch.testing.assert_close(p.marginals, marginal(s))
    torch.testing.assert_close(p.losses, bradley_terry(marginal(s)))
    assert not any(x.requires_grad for x in (*p, *d))


@quick
@given(shapes, seeds, sizes)
def test_any_likelihood(shape: tuple[int, int], seed: int, size: float) -> None:
    """A ranking of four: -sum c_k w_ki s_ki has the gradient of the negative log-likelihood."""
    s = scores((shape[0], 4, shape[1]), seed, size).requires_grad_()
    p = ops.preference_weights(plackett_luce, s)
    (surrogate,) = torch.autograd.grad(-(p.coefficients[..., None] * p.weights * s).sum(), s)
    (exact,) = torch.autograd.grad(plackett_luce(marginal(s)).sum(), s)
    torch.testing.assert_close(surrogate, exact, rtol=1e-12, atol=1e-15)


@quick
@given(seeds, st.integers(1, 5))
def test_on_policy_phase_b(seed: int, n: int) -> None:
    """Point 3: at ratio 1 the policy loss has the gradient -(m/n) A_i / |o_i| for log pi of each token of thought i."""
    s = scores((2, n), seed, 3.0)
    m, w, _ = ops.dual_weights(s[:1], s[1:])
    lengths = [1 + i % 3 for i in range(n)]
    advantage = torch.cat([(w[0, i] - 1 / n).repeat(k) for i, k in enumerate(lengths)])
    token_weight = torch.cat([(m / (n * k)).repeat(k) for k in lengths])
    logprob = -torch.rand(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logprob.requires_grad_()
    loss = ops.policy_loss(logprob, logprob.detach(), advantage, token_weight).loss
    (gradient,) = torch.autograd.grad(loss, logprob)
    torch.testing.assert_close(gradient, -token_weight * advantage, rtol=1e-12, atol=1e-15)


@quick
@given(shapes, seeds)
def test_symmetry(shape: tuple[int, int], seed: int) -> None:
    """Point 4: swapping the sides at m = 1/2 flips the sign. The order of thoughts and of pairs changes nothing."""
    s = scores((shape[0], 2, shape[1]), seed, 3.0)
    p = ops.preference_weights(bradley_terry, s)
    thoughts, pairs = torch.randperm(shape[1]), torch.randperm(shape[0])
    q = ops.preference_weights(bradley_terry, s[pairs][..., thoughts])
    torch.testing.assert_close(q.weights, p.weights[pairs][..., thoughts])
    torch.testing.assert_close(q.coefficients, p.coefficients[pairs])
    even = torch.stack([s[:, 0], s[:, 0].flip(-1)], 1)  # equal marginals
    d = ops.preference_weights(bradley_terry, even)
    swapped = ops.preference_weights(bradley_terry, even.flip(1))
    torch.testing.assert_close(d.coefficients.abs(), torch.full_like(d.coefficients, 0.5))
    gradient, other = (x.coefficients[..., None] * x.weights for x in (d, swapped))
    torch.testing.assert_close(gradient, -other.flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("good", [0.0, -80.0, -1e4])
@pytest.mark.parametrize("bad", [0.0, -80.0, -1e4])
def test_saturated_scores_are_finite(dtype: torch.dtype, good: float, bad: float) -> None:
    """Point 6, also in combination with an ordinary score."""
    for extra in (good, -1.0):
        s = torch.tensor([[[good, extra], [bad, bad]]], dtype=dtype)
        p, d = ops.preference_weights(bradley_terry, s), ops.dual_weights(s[:, 0], s[:, 1])
        assert all(x.isfinite().all() for x in (*p, *d))
        torch.testing.assert_close(p.weights.sum(-1), torch.ones(1, 2, dtype=dtype))
        gap = marginal(s.double()[0]).diff().item()
        assert d.misalignment.item() == pytest.approx(1 / (1 + math.exp(min(-gap, 700.0))), rel=1e-5, abs=1e-30)


def test_valid_leaves_thoughts_out() -> None:
    s = scores((3, 2, 5), 0, 3.0)
    valid = torch.ones(3, 2, 5, dtype=torch.bool)
    valid[:, :, 3:] = False
    hidden = s.masked_fill(~valid, torch.nan)
    got, want = ops.preference_weights(bradley_terry, hidden, valid), ops.preference_weights(bradley_terry, s[..., :3])
    torch.testing.assert_close(got.coefficients, want.coefficients)
    torch.testing.assert_close(got.weights[..., :3], want.weights)
    assert (got.weights[..., 3:] == 0).all()
    valid[0, 0, 2] = False  # the sides have different numbers of thoughts: the mean is over valid thoughts
    ragged = ops.preference_weights(bradley_terry, hidden, valid)
    torch.testing.assert_close(ragged.marginals[0], torch.stack([marginal(s[0, 0, :2]), marginal(s[0, 1, :3])]))
    pair = ops.dual_weights(s[:1, 0, :2], s[:1, 1, :3])
    torch.testing.assert_close(ragged.coefficients[0, 0], pair.misalignment[0])
    valid[0, 1] = False
    none = ops.preference_weights(bradley_terry, hidden, valid)
    assert (none.weights[0, 1] == 0).all()
    assert all(x.isfinite().all() for x in none)


def test_dtypes() -> None:
    s: Any = scores((2, 2, 3), 0, 1.0)
    for given_dtype, found in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        p = ops.preference_weights(bradley_terry, s.to(given_dtype))
        assert {x.dtype for x in p} == {found}
