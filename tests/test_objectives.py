"""The gradient of the objective equals the documented one (docs/method.md, 2.2: points 1 to 4 and 6)."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.objectives.agreement import order_credit, rank_grid
from dwrl_fast.objectives.dual_weighted import (
    centred_reward,
    effective_coefficients,
    score_objective,
    standardised_reward,
    thought_signal,
)
from dwrl_fast.objectives.group_relative import group_advantage
from dwrl_fast.objectives.likelihood import Likelihood, preference_likelihood


def pair(groups: int, margin: float = 0.0) -> Likelihood:
    return preference_likelihood([(1, 2)] * groups, [margin] * groups)


def drawn_scores(groups: int = 5, thoughts: int = 4, seed: int = 0) -> Tensor:
    return -5 * torch.rand(groups, 2, thoughts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def phase_a(likelihood: Likelihood, scores: Tensor, misalignment_weight: bool = True) -> Tensor:
    valid = torch.ones_like(scores, dtype=torch.bool)
    found = ops.preference_weights(likelihood, scores)
    return score_objective(
        scores, effective_coefficients(found.coefficients, misalignment_weight), found.weights, valid
    )


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf)[0]


def plackett_luce(marginals: Tensor) -> Tensor:
    """-log of the probability of the given order of the responses."""
    later = marginals.flip(-1).logcumsumexp(-1).flip(-1)
    return (later - marginals).sum(-1)


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_phase_a_is_the_gradient_of_bradley_terry(margin: float) -> None:
    scores = drawn_scores().requires_grad_()
    marginals = scores.logsumexp(-1) - torch.tensor(4.0).log()
    exact = gradient(pair(5, margin)(marginals).sum(), scores)
    torch.testing.assert_close(gradient(phase_a(pair(5, margin), scores), scores), exact, rtol=1e-12, atol=1e-15)


def test_phase_a_is_the_gradient_of_any_likelihood() -> None:
    scores = -5 * torch.rand(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores.requires_grad_()
    exact = gradient(plackett_luce(scores.logsumexp(-1)).sum(), scores)
    torch.testing.assert_close(gradient(phase_a(plackett_luce, scores), scores), exact, rtol=1e-12, atol=1e-15)


def test_the_weight_switched_off_is_the_sign() -> None:
    scores = drawn_scores().requires_grad_()
    on, off = (gradient(phase_a(pair(5), scores, weight), scores) for weight in (True, False))
    m = ops.preference_weights(pair(5), scores.detach()).coefficients[:, 0]
    torch.testing.assert_close(off * m[:, None, None], on)
    assert effective_coefficients(torch.tensor([[0.0, -0.2]]), False).tolist() == [[0.0, -1.0]]


class Enumerable:
    """A policy over the 63 words of at most 5 letters from {a, b}, and a score for each word, for y+ and for y-.

    A word's tokens are its letters and an end token, which is certain after the fifth letter.
    """

    def __init__(self, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.logits = (0.7 * torch.randn(2, 31, 3, dtype=torch.float64, generator=draw)).requires_grad_()
        self.verdicts = (1.5 * torch.randn(2, 63, dtype=torch.float64, generator=draw)).requires_grad_()
        prefixes = [""]
        for prefix in prefixes:
            if len(prefix) < 4:
                prefixes += [prefix + "a", prefix + "b"]
        assert len(prefixes) == 31
        self.words = prefixes + [prefix + letter for prefix in prefixes[15:] for letter in "ab"]
        place = {prefix: i for i, prefix in enumerate(prefixes)}
        steps = [[(place[w[:t]], "ab".index(w[t])) for t in range(len(w))] for w in self.words]
        self.steps = [[*s, (place[w], 2)] if w in place else s for s, w in zip(steps, self.words, strict=True)]
        self.lengths = torch.tensor([len(w) + 1 for w in self.words])

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.logits, self.verdicts

    def scores(self) -> Tensor:
        return torch.nn.functional.logsigmoid(self.verdicts)

    def logprobs(self) -> Tensor:
        """The log-probs of whole words, [2, 63]."""
        logp = self.logits.log_softmax(-1)
        rows = [sum(logp[:, p, token] for p, token in steps) for steps in self.steps]
        return torch.stack([torch.as_tensor(row) for row in rows], -1)

    def exact(self) -> Tensor:
        """The gradient of -log(p+ / (p+ + p-)), summed over every thought."""
        marginals = (self.logprobs() + self.scores()).logsumexp(-1)
        return self.flat(pair(1)(marginals[None]).sum())

    def flat(self, loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.leaves)])

    def estimates(self, n: int, draws: int, blocks: int, normalization: str) -> Iterator[Tensor]:
        """Mean gradients of phases A + B of the package's objective, one per block. The blocks have `draws` groups in
        total, with n thoughts per side.
        """
        generator = torch.Generator().manual_seed(n)
        probabilities = self.logprobs().detach().exp()
        for _ in range(blocks):
            size = draws // blocks
            sides = [torch.multinomial(p, size * n, replacement=True, generator=generator) for p in probabilities]
            chosen = torch.stack([side.view(size, n) for side in sides], 1)
            scores, logprobs = (
                torch.stack([values[k][chosen[:, k]] for k in (0, 1)], 1) for values in (self.scores(), self.logprobs())
            )
            valid = torch.ones_like(chosen, dtype=torch.bool)
            found = ops.preference_weights(pair(size), scores)
            a = score_objective(scores, found.coefficients, found.weights, valid)
            signal = thought_signal(
                found.coefficients,
                centred_reward(found.weights, valid),
                self.lengths[chosen],
                valid,
                valid,
                normalization,
            )
            # On-policy every ratio is 1, and a word's tokens have the same weight, so they can be treated as one token.
            b = ops.policy_loss(
                logprobs.flatten(),
                logprobs.detach().flatten(),
                signal.advantage.flatten(),
                signal.token_weight.flatten(),
            )
            yield self.flat(a + b.loss) / size


def relative_bias(estimates: Tensor, exact: Tensor) -> Tensor:
    """|E[g] - exact| / |exact| from block means [B, D]. Only products of different blocks are used, without noise
    terms.
    """
    gaps = estimates - exact
    blocks = len(gaps)
    square = (gaps.sum(0).square().sum() - gaps.square().sum()) / (blocks * (blocks - 1))
    return square.clamp_min(0).sqrt() / exact.norm()


def log_slope(biases: Tensor, ns: Tensor) -> Tensor:
    x, y = ns.double().log(), biases.log()
    return ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()


def test_enumerated_policy_is_a_distribution() -> None:
    model = Enumerable()
    assert len(set(model.words)) == 63
    torch.testing.assert_close(model.logprobs().exp().sum(-1), torch.ones(2, dtype=torch.float64))


def test_monte_carlo_gradient_converges_to_the_exact_one_as_1_over_n() -> None:
    model, ns, blocks = Enumerable(), torch.tensor([4, 16, 64]), 20
    exact = model.exact()
    runs = [torch.stack(list(model.estimates(int(n), 200_000, blocks, "likelihood"))) for n in ns]
    slope = log_slope(torch.stack([relative_bias(run, exact) for run in runs]), ns)
    left_out = [[run[torch.arange(blocks) != b] for run in runs] for b in range(blocks)]
    jackknife = torch.stack(
        [log_slope(torch.stack([relative_bias(run, exact) for run in some]), ns) for some in left_out]
    )
    error = ((blocks - 1) * jackknife.var(unbiased=False)).sqrt()
    assert error < 0.1, f"too noisy to tell: slope {slope:.3f} +- {error:.3f}"
    # The term in 1/n^2 changes the slope a little at n = 4.
    assert abs(slope + 1) < 3 * error + 0.05, f"slope {slope:.3f} +- {error:.3f}"


def test_paper_normalization_differs_in_kind_from_the_likelihoods() -> None:
    model = Enumerable()
    exact = model.exact()
    biases = [relative_bias(torch.stack(list(model.estimates(n, 20_000, 4, "paper"))), exact).item() for n in (4, 64)]
    assert min(biases) > 0.3, "B vanishes as 1/n here: a bias that vanishes would mean the two are the same"


@pytest.mark.parametrize("normalization", ["paper", "likelihood"])
def test_phase_b_on_policy_is_its_analytic_gradient(normalization: str) -> None:
    """-(m/n) sum_i A_i / |o_i| sum_t grad log pi(o_t), computed in loops over thoughts and tokens."""
    scores = drawn_scores(3, 4)
    lengths = torch.tensor([1, 3, 2, 5]).expand(3, 2, 4)
    tokens = int(lengths.sum())
    logprob = -torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logprob.requires_grad_()
    valid = torch.ones_like(scores, dtype=torch.bool)
    found = ops.preference_weights(pair(3), scores)
    signal = thought_signal(
        found.coefficients, centred_reward(found.weights, valid), lengths, valid, valid, normalization
    )
    segment_ids = torch.repeat_interleave(torch.arange(lengths.numel()), lengths.flatten())
    loss = ops.policy_loss(
        logprob, logprob.detach(), signal.advantage.flatten()[segment_ids], signal.token_weight.flatten()[segment_ids]
    ).loss

    expected, t = torch.zeros(tokens, dtype=torch.float64), 0
    for p in range(3):
        marginals = [scores[p, k].exp().mean() for k in (0, 1)]
        m = marginals[1] / (marginals[0] + marginals[1])
        for k, sign in ((0, 1), (1, -1)):
            for i in range(4):
                advantage = sign * (scores[p, k, i].exp() / scores[p, k].exp().sum() - 1 / 4)
                scale = m / 4 / lengths[p, k, i] if normalization == "paper" else m
                for _ in range(int(lengths[p, k, i])):
                    expected[t] = -scale * advantage
                    t += 1
    torch.testing.assert_close(gradient(loss, logprob), expected, rtol=1e-12, atol=1e-15)


def test_masked_thoughts_train_nothing_and_still_count() -> None:
    scores, lengths = drawn_scores(2, 3), torch.full((2, 2, 3), 4)
    valid = torch.ones_like(scores, dtype=torch.bool)
    trained = valid.clone()
    trained[0, 1, 2] = False
    found = ops.preference_weights(pair(2), scores)
    reward = centred_reward(found.weights, valid)
    whole, masked = (thought_signal(found.coefficients, reward, lengths, valid, t, "paper") for t in (valid, trained))
    assert masked.token_weight[0, 1, 2] == 0 and torch.equal(masked.advantage, whole.advantage)
    assert torch.equal(masked.token_weight[trained], whole.token_weight[trained])


def test_an_absent_thought_is_as_if_it_were_not_there() -> None:
    scores = drawn_scores(2, 4)
    valid = torch.ones_like(scores, dtype=torch.bool)
    valid[1, 0, 3] = False
    lengths = torch.full((2, 2, 4), 3)
    found = ops.preference_weights(pair(2), scores, valid)
    for reward in (centred_reward, standardised_reward):
        signal = thought_signal(found.coefficients, reward(found.weights, valid), lengths, valid, valid, "paper")
        assert signal.advantage[1, 0, 3] == 0 and signal.token_weight[1, 0, 3] == 0
        some = [scores[1, 0, :3], scores[1, 1]]
        for k in (0, 1):
            w = some[k].softmax(-1)
            expected = w - 1 / len(w)
            if reward is standardised_reward:
                expected = expected / (w.std() + 1e-4)
            torch.testing.assert_close(signal.advantage[1, k, : len(w)], (1, -1)[k] * expected)


def test_swapping_the_responses_flips_the_gradient_at_one_half() -> None:
    scores = drawn_scores(4).requires_grad_()
    level = scores.detach() - scores.detach().logsumexp(-1, keepdim=True)
    level.requires_grad_()
    assert torch.allclose(ops.preference_weights(pair(4), level).coefficients[:, 0], torch.tensor(0.5).double())
    here = gradient(phase_a(pair(4), level), level)
    swapped = gradient(phase_a(pair(4), level.flip(1)), level)
    torch.testing.assert_close(swapped, -here)


def test_order_of_thoughts_and_pairs_changes_nothing() -> None:
    scores = drawn_scores(4).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    thoughts, pairs = torch.randperm(4, generator=generator), torch.randperm(4, generator=generator)
    here = gradient(phase_a(pair(4), scores), scores)
    moved = gradient(phase_a(pair(4), scores[:, :, thoughts][pairs]), scores)
    torch.testing.assert_close(moved, here, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen, rejected", [(0.0, 0.0), (-80.0, -80.0), (0.0, -80.0), (-80.0, 0.0)])
def test_saturated_scores_stay_finite(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    scores = torch.tensor([[[chosen] * 4, [rejected] * 4]], dtype=dtype, requires_grad=True)
    valid = torch.ones_like(scores, dtype=torch.bool)
    found = ops.preference_weights(pair(1), scores)
    grads = gradient(score_objective(scores, found.coefficients, found.weights, valid), scores)
    rewards = (centred_reward(found.weights, valid), standardised_reward(found.weights, valid))
    for value in (*found, grads, *rewards):
        assert value.isfinite().all()
    torch.testing.assert_close(found.weights, torch.full_like(scores, 0.25).detach())
    if chosen < rejected:
        assert found.coefficients[0, 0] == 1


def test_phase_a_sums_valid_thoughts_only() -> None:
    """The content of an absent slot, even NaN, affects neither the value nor the gradient."""
    scores = torch.tensor([[[-1.0, -2.0], [-0.5, torch.nan]]], requires_grad=True)
    valid = torch.tensor([[[True, True], [True, False]]])
    weights = torch.tensor([[[0.75, 0.25], [1.0, 0.5]]])
    value = score_objective(scores, torch.tensor([[0.5, -0.25]]), weights, valid)
    assert value.item() == -(0.5 * (0.75 * -1.0 + 0.25 * -2.0) - 0.25 * -0.5)
    (found,) = torch.autograd.grad(value, scores)
    assert found.nan_to_num().tolist() == [[[-0.375, -0.125], [0.25, 0.0]]]


def test_two_thoughts_are_standardised_by_their_own_spread() -> None:
    """0.8 and 0.2 are 0.3 from their mean; the standard deviation of two values divides by 1."""
    spread = math.sqrt(2 * 0.3**2)
    found = standardised_reward(torch.tensor([[[0.8, 0.2]]]).double(), torch.ones(1, 1, 2, dtype=torch.bool))
    assert found.flatten().tolist() == pytest.approx([0.3 / (spread + 1e-4), -0.3 / (spread + 1e-4)], rel=1e-6)
    assert group_advantage(torch.tensor([1.0, 0.0]).double()).tolist() == pytest.approx(
        [0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)], rel=1e-6
    )


def test_one_thought_alone_has_no_advantage() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert standardised_reward(torch.ones(1, 1, 1), one).item() == 0
    assert group_advantage(torch.tensor([[3.0], [-2.0]])).tolist() == [[0.0], [0.0]]


def test_an_empty_thought_has_a_finite_weight() -> None:
    valid = torch.tensor([[[True, True], [True, False]]])
    c, lengths = torch.tensor([[0.5, -0.5]]), torch.tensor([[[0, 4], [2, 0]]])
    signal = thought_signal(c, torch.ones(1, 2, 2), lengths, valid, valid, "paper")
    assert signal.token_weight.tolist() == [[[0.5 / 2, 0.5 / 8], [0.5 / 2, 0.0]]]


def test_a_group_whose_responses_tie_has_credit_0() -> None:
    credit, some = order_credit(torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]]), rank_grid([(1, 1), (1, 2), (1, 2)]))
    assert credit.tolist() == [0.0, 1.0, 0.5] and some.tolist() == [False, True, True]
