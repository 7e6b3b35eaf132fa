"""Likelihoods of every data format against explicit orders and probabilities, in float64 and higher precision
(docs/method.md, 2.1; 2.2, points 1 and 6).
"""

from itertools import permutations
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from orders import agreeing_orders, mean_order_loss
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.objectives.dual_weighted import score_objective
from dwrl_fast.objectives.likelihood import preference_likelihood

PAIR, TIED_PAIR, RANKING, TIED_RANKING = (1, 2), (1, 1), (1, 2, 3, 4, 5), (1, 2, 2, 4, 4)
quick = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
rank_lists = st.lists(st.integers(1, 5), min_size=2, max_size=5)


def drawn(*shape: int, seed: int = 0, size: float = 2.0) -> Tensor:
    return size * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(marginals: Tensor, *ranks: tuple[int, ...] | list[int], margin: float = 0.0) -> Tensor:
    return preference_likelihood(ranks, [margin] * len(ranks))(marginals)


BATCHES: dict[str, tuple[list[tuple[int, ...]], list[float]]] = {
    "pairs": ([PAIR] * 3, [0.0, 1.5, -0.7]),
    "tied pairs": ([TIED_PAIR] * 3, [0.0] * 3),
    "rankings": ([RANKING, (2, 5, 1, 4, 3)], [0.0] * 2),
    "tied rankings": ([TIED_RANKING, (1, 1, 1, 1, 1), (3, 1, 2, 2, 2)], [0.0] * 3),
    "mixed": ([PAIR, TIED_RANKING, TIED_PAIR, RANKING, PAIR, (1, 2, 2)], [2.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_are_those_of_explicit_orders(name: str) -> None:
    ranks, margins = BATCHES[name]
    marginals = drawn(len(ranks), max(map(len, ranks))).requires_grad_()
    found = preference_likelihood(ranks, margins)(marginals)
    expected = torch.stack(
        [mean_order_loss(marginals[p], *row) for p, row in enumerate(zip(ranks, margins, strict=True))]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    one, other = (torch.autograd.grad(value.sum(), marginals)[0] for value in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", BATCHES)
def test_phase_a_is_the_gradient_of_every_likelihood(name: str) -> None:
    """Computed by `ops.preference_weights`, with up to 3 thoughts per response, and none for an absent response."""
    ranks, margins = BATCHES[name]
    scores = -drawn(len(ranks), max(map(len, ranks)), 3).abs().requires_grad_()
    valid = torch.zeros(scores.shape, dtype=torch.bool)
    for p, one in enumerate(ranks):
        valid[p, : len(one)] = True
        valid[p, 1, 1] = p % 2 == 0  # the number of thoughts varies too
    weights = ops.preference_weights(preference_likelihood(ranks, margins), scores, valid)
    objective = score_objective(scores, weights.coefficients, weights.weights, valid)
    (found,) = torch.autograd.grad(objective, scores)

    losses = []
    for p, (one, margin) in enumerate(zip(ranks, margins, strict=True)):
        some = [scores[p, k][valid[p, k]] for k in range(len(one))]
        losses.append(mean_order_loss(torch.stack([s.exp().mean().log() for s in some]), one, margin))
    (expected,) = torch.autograd.grad(torch.stack(losses).sum(), scores)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights.losses, torch.stack(losses))
    assert (found[~valid] == 0).all()


@quick
@given(rank_lists, seeds)
def test_any_ranks_are_the_mean_over_their_orders(ranks: list[int], seed: int) -> None:
    marginals = drawn(1, len(ranks), seed=seed).requires_grad_()
    found, expected = loss(marginals, ranks), mean_order_loss(marginals[0], ranks)[None]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    one, other = (torch.autograd.grad(value.sum(), marginals)[0] for value in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@quick
@given(st.lists(rank_lists, min_size=1, max_size=6), seeds, st.sampled_from([0.0, float("inf"), float("nan")]))
def test_a_group_is_alone_in_its_batch(batch: list[list[int]], seed: int, absent: float) -> None:
    """The other groups, and the values in the places of absent responses, have no effect."""
    width = max(map(len, batch))
    marginals = drawn(len(batch), width, seed=seed)
    for p, ranks in enumerate(batch):
        marginals[p, len(ranks) :] = -absent
    marginals.requires_grad_()
    found = loss(marginals, *batch)
    (gradient,) = torch.autograd.grad(found.sum(), marginals)
    for p, ranks in enumerate(batch):
        leaf = marginals[p : p + 1, : len(ranks)].detach().requires_grad_()
        alone = loss(leaf, ranks)
        torch.testing.assert_close(found[p : p + 1], alone, rtol=1e-13, atol=0)
        (expected,) = torch.autograd.grad(alone.sum(), leaf)
        torch.testing.assert_close(gradient[p : p + 1, : len(ranks)], expected, rtol=1e-12, atol=1e-16)
        assert (gradient[p, len(ranks) :] == 0).all()


def test_orders_are_a_distribution() -> None:
    """Plackett-Luce: the probabilities of the 120 orders of 5 responses sum to 1."""
    marginals = drawn(1, 5).expand(120, 5)
    total = (-loss(marginals, *permutations(range(1, 6)))).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-13, atol=0)


def test_two_ranked_are_a_pair_and_two_tied_half_of_each_order() -> None:
    marginals = drawn(4, 2)
    d = marginals[:, 0] - marginals[:, 1]
    log_sigmoid = torch.nn.functional.logsigmoid
    assert torch.equal(loss(marginals, *[PAIR] * 4), -log_sigmoid(d))
    assert torch.equal(loss(marginals, *[PAIR] * 4, margin=0.5), -log_sigmoid(d - 0.5))
    torch.testing.assert_close(loss(marginals, *[(2, 1)] * 4), -log_sigmoid(-d), rtol=1e-15, atol=0)
    tied = -(log_sigmoid(d) + log_sigmoid(-d)) / 2
    torch.testing.assert_close(loss(marginals, *[TIED_PAIR] * 4), tied, rtol=1e-15, atol=0)


@quick
@given(rank_lists, seeds)
def test_responses_may_stand_in_any_order(ranks: list[int], seed: int) -> None:
    """The order of the responses, including tied ones, changes neither the loss nor the gradient of any response."""
    marginals = drawn(1, len(ranks), seed=seed)
    here = marginals.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(here, ranks).sum(), here)
    order = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(seed))
    moved = marginals[:, order].clone().requires_grad_()
    value = loss(moved, [ranks[k] for k in order])
    torch.testing.assert_close(value, loss(marginals, ranks), rtol=1e-13, atol=1e-15)
    (elsewhere,) = torch.autograd.grad(value.sum(), moved)
    torch.testing.assert_close(elsewhere, gradient[:, order], rtol=1e-12, atol=1e-15)


def test_seven_tied_are_log_seven_factorial_where_all_are_alike() -> None:
    marginals = drawn(1, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(marginals, (1,) * 7).sum(), marginals)
    orders = torch.tensor(list(permutations(range(7))))
    leaf = marginals[0].detach().requires_grad_()
    placed = leaf[orders]
    explicit = (placed.flip(-1).logcumsumexp(-1).flip(-1) - placed).sum(-1).mean()
    torch.testing.assert_close(loss(marginals, (1,) * 7)[0], explicit, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[0], torch.autograd.grad(explicit, leaf)[0], rtol=1e-11, atol=1e-13)
    even = loss(torch.zeros(1, 7, dtype=torch.float64), (1,) * 7)
    torch.testing.assert_close(even, torch.tensor([log(5040)], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [PAIR, TIED_PAIR, (1, 2, 3), (1, 2, 2), (1, 1, 1)], ids=str)
def test_saturated_scores(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    """All combinations of scores near 0, -80 and -1e4: losses and gradients have small relative errors, compared with
    30-digit arithmetic, down to the smallest number of the dtype.
    """
    values = torch.tensor([0.0, -1e-3, -80.0, -81.5, -1e4, -1e4 + 0.25], dtype=dtype)
    grid = torch.cartesian_prod(*[values] * len(ranks)).requires_grad_()
    losses = loss(grid, *[ranks] * len(grid))
    (gradient,) = torch.autograd.grad(losses.sum(), grid)
    assert losses.isfinite().all() and gradient.isfinite().all()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    mp.dps = 30
    for row, value, slope in zip(grid.tolist(), losses.tolist(), gradient.tolist(), strict=True):
        exact, slopes = exact_loss(row, ranks)
        spread = max(row) - min(row)  # the relative error of exp(x) is the absolute error of x
        assert abs(value - exact) <= eps * (8 + spread) * exact + tiny
        for one, other in zip(slope, slopes, strict=True):
            # The slope of a response that wins some comparisons and loses others is a difference, so its error is
            # absolute.
            scale = abs(other) * (8 + spread) if ranks == PAIR else 8
            assert abs(one - other) <= eps * scale + tiny


def exact_loss(row: list[float], ranks: tuple[int, ...]) -> tuple[float, list[float]]:
    """The mean over orders and its gradient, to 30 digits even if they are tiny: no subtraction loses digits."""
    k = range(len(row))
    orders = agreeing_orders(ranks)
    total, slopes = mp.mpf(0), [mp.mpf(0) for _ in k]
    for order in orders:
        for place, winner in enumerate(order[:-1]):
            odds = [mp.exp(mp.mpf(row[i]) - row[winner]) for i in order[place + 1 :]]
            total += mp.log1p(sum(odds)) / len(orders)
            slopes[winner] -= sum(odds) / (1 + sum(odds)) / len(orders)
            for i, odd in zip(order[place + 1 :], odds, strict=True):
                slopes[i] += odd / (1 + sum(odds)) / len(orders)
    return float(total), [float(s) for s in slopes]


@pytest.mark.parametrize(
    ("ranks", "margin", "message"),
    [
        ((1,), 0.0, "2 responses or more"),
        ((1, 1, 2, 3, 4, 5, 6, 7), 0.0, "at most 7"),
        (TIED_PAIR, 1.0, "ordered pair"),
        (RANKING, 1.0, "ordered pair"),
    ],
)
def test_what_has_no_likelihood_is_refused(ranks: tuple[int, ...], margin: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_likelihood([PAIR, ranks], [0.0, margin])


def test_marginals_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3\].*\[1, 2\]"):
        loss(torch.zeros(1, 3), PAIR)
    with pytest.raises(ValueError, match="zip"):
        preference_likelihood([PAIR], [0.0, 0.0])
