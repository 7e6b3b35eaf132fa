"""Methods that judge in text or by a label: their samples and rewards, their losses, verdicts in both orders."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from fakes import FakeSampler
from judging import A, B, logprobs, make_policy, taken_gradients
from tiny import tiny_rows

from dwrl_fast.data import Preference
from dwrl_fast.encode import both_orders, drawn_orders
from dwrl_fast.evaluation.sources import source_reports
from dwrl_fast.objectives.group_relative import choice_rewards, group_advantage, point_rewards
from dwrl_fast.scoring import ChoiceJudging, marginal_scores


@pytest.mark.parametrize("name", ["gram", "genrm"])
def test_label_losses_are_smoothed_cross_entropy(folder: Path, name: str) -> None:
    policy = make_policy(folder, name)
    groups, _ = policy.rollout(tiny_rows(folder)[:4])
    loss, gradients, _ = policy.step(groups, budget=400)
    wanted = []
    smoothing = 0.1 if name == "gram" else 0.0
    for group in groups:
        ids = torch.tensor([group.flat[0].ids])
        logits = policy.model.lm(ids).logits[0, -1].log_softmax(-1)
        labels, (right,) = policy.dialog.label_ids, group.labels
        wanted.append(-(1 - smoothing) * logits[labels[right]] - smoothing * logits[labels[1 - right]])
    total = torch.stack(wanted).mean()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(gradients, taken_gradients(policy.model), rtol=1e-4, atol=1e-6)


def test_orders_are_drawn_and_say_which_is_right() -> None:
    rows = [Preference((), ("a", "b"), source=f"x:{i}") for i in range(200)]
    drawn = drawn_orders(rows, 3)
    assert all(len(some) == 1 and some[0].right == (some[0].first == 1) for some in drawn)
    assert 70 < sum(some[0].first for some in drawn) < 130
    assert drawn == drawn_orders(rows, 3) != drawn_orders(rows, 4)
    ranking = Preference((), ("a", "b", "c"), ranks=(1, 2, 2))
    assert sorted(tuple(sorted(c.places)) for c in drawn_orders([ranking], 0)[0]) == [(0, 1), (0, 2)]  # the tie is out
    assert [c.right for c in both_orders(ranking)] == [0, 0, 1, None, 1, None]


def test_rewards_and_advantages() -> None:
    assert choice_rewards([0, 1, None, 1], 1) == [0.0, 1.0, 0.0, 1.0]
    points = [[7.0, None, 3.0], [5.0, 2.0, None]]
    assert point_rewards(points, (1, 2)) == [[2 / 3, 0.0, 1 / 3], [1 / 3, 2 / 3, 0.0]]
    assert point_rewards([[3.0], [3.0]], (1, 2)) == [[0.0], [0.0]]  # a tie is on no side
    assert point_rewards([[3.0], [1.0], [2.0]], (1, 2, 2)) == [[1.0], [1.0], [1.0]]
    advantage = group_advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    spread = math.sqrt(1 / 3)
    torch.testing.assert_close(advantage[0], torch.tensor([0.5, -0.5, -0.5, 0.5]) / (spread + 1e-4))
    assert advantage[1].eq(0).all()


@pytest.mark.parametrize("name", ["grpo-pair", "grpo-point"])
def test_the_grpo_gradient_is_the_policy_gradient(folder: Path, name: str) -> None:
    """On-policy it is the mean over sequences of A_i / |o_i| sum_t grad log pi."""
    policy = make_policy(folder, name)
    groups, logs = policy.rollout(tiny_rows(folder)[:4])
    assert set(logs) >= {"reward", "unparsable", "thought_length"}
    g = torch.Generator().manual_seed(0)
    groups = [  # a random model writes no verdicts, so rewards are random
        group.with_rewards([torch.rand(len(r), generator=g).round().tolist() for r in group.rewards])
        for group in groups
    ]
    _, gradients, _ = policy.step(groups, budget=400)
    terms = []
    for group in groups:
        for sequences, rewards in zip(group.sequences, group.rewards, strict=True):
            for sequence, advantage in zip(sequences, group_advantage(torch.tensor(rewards)), strict=True):
                terms.append(-advantage * logprobs(policy.model, sequence).mean())
    torch.stack(terms).mean().backward()
    torch.testing.assert_close(gradients, taken_gradients(policy.model), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["gram", "genrm", "grpo-pair", "grpo-point"])
def test_verdicts(folder: Path, name: str) -> None:
    """Scores of every response, and a report that counts unreadable verdicts."""
    groups = make_policy(folder, name).judging.score_groups(tiny_rows(folder)[:5], votes=1, seed=0)
    assert marginal_scores(groups).shape == (5, 2)
    report = source_reports(groups, 0)[""]
    if name in ("gram", "genrm"):
        assert report.unparsable == 0 and 0 < (report.first_share or 0) < 1
        for found in groups:
            p = torch.tensor(found.scores).exp()
            assert p.sum().item() == pytest.approx(1)
    else:
        asked = sum(len(found.group.flat) for found in groups)
        assert report.unparsable == asked == 10 and report.accuracy == 0 and report.first_share is None


def test_an_unread_verdict_is_wrong_and_equal_orders_tie(folder: Path) -> None:
    policy, (row, *_) = make_policy(folder, "grpo-pair"), tiny_rows(folder)
    first = policy.dialog.tokenizer.decode(policy.dialog.context(row.prompt, row.responses).ids)

    def accuracy(*says: str) -> float:
        sampler = FakeSampler(policy.dialog, lambda text, i: says[text != first])
        judging = ChoiceJudging(dataclasses.replace(policy.runtime, sampler=sampler), policy.method.card())
        return source_reports(judging.score_groups([row]), 0)[""].accuracy

    assert accuracy(A, B) == 1 and accuracy(B, A) == 0
    assert accuracy(A, A) == accuracy(B, B) == accuracy(A, "ok") == accuracy("ok", B) == 0.5
    assert accuracy("ok", "ok") == accuracy(B, "ok") == 0
