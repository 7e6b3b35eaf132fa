"""Methods that judge in text or by a label: what they sample and reward, their losses, verdicts in both orders."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_folder, tiny_rows
from torch import Tensor

from dwrl_fast.batching.batch import Size
from dwrl_fast.compute import Compute
from dwrl_fast.data import Preference
from dwrl_fast.dialog import SingleTurn
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import Group, Thought, both_orders, drawn_orders
from dwrl_fast.evaluation.sources import source_reports
from dwrl_fast.methods import METHODS, Method, StepMetrics
from dwrl_fast.objectives.group_relative import choice_rewards, group_advantage, point_rewards
from dwrl_fast.scoring import ChoiceJudging, Runtime, marginal_scores
from dwrl_fast.templates import Template

PAIRWISE = Template("compare {prompt} A {response_a} B {response_b}", labels=None, kind="pairwise")
POINTWISE = Template("score {prompt} {response}", labels=None, kind="pointwise")
DIRECT = Template("compare {prompt} A {response_a} B {response_b}", labels=("A", "B"), kind="direct")
TEMPLATES = {"gram": DIRECT, "genrm": DIRECT, "grpo-pair": PAIRWISE, "grpo-point": POINTWISE}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "tiny")
    tiny_rows(tmp_path)
    return tmp_path


def make_method(folder: Path, name: str) -> Method:
    dialog = SingleTurn(make_tokenizer(), TEMPLATES[name], "correctness")
    return METHODS[name](tiny_config(folder, method=name), dialog, Compute.resolve("fp32"))


def backward(method: Method, groups: list[Group]) -> tuple[float, Tensor]:
    batches = method.layout.batches(groups)
    total = 0.0
    for batch in batches:
        loss = method.loss(method.phases[0], batch, Size.of(batches), StepMetrics())
        loss.backward()
        total += loss.item()
    gradient = torch.cat([p.grad.flatten() for p in method.model.parameters() if p.grad is not None])
    method.model.zero_grad()
    return total, gradient


@pytest.mark.parametrize("name", ["gram", "genrm"])
def test_label_losses_are_smoothed_cross_entropy(folder: Path, name: str) -> None:
    method, rows = make_method(folder, name), tiny_rows(folder)[:4]
    groups, _ = method.rollout(rows, 0, lambda n: None)
    loss, gradient = backward(method, groups)
    wanted = []
    smoothing = 0.1 if name == "gram" else 0.0
    for group in groups:
        ids = torch.tensor([group.flat[0].ids])
        logits = method.model.lm(ids).logits[0, -1].log_softmax(-1)
        labels = method.dialog.label_ids
        wanted.append(
            -(1 - smoothing) * logits[labels[group.right[0]]] - smoothing * logits[labels[1 - group.right[0]]]
        )
    total = torch.stack(wanted).mean()
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in method.model.parameters() if p.grad is not None])
    assert loss == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


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
    """On the policy that sampled, the mean over sequences of A_i / |o_i| sum_t grad log pi."""
    method, rows = make_method(folder, name), tiny_rows(folder)[:4]
    groups, logs = method.rollout(rows, 0, lambda n: None)
    assert set(logs) >= {"reward", "unparsable", "thought_length"}
    g = torch.Generator().manual_seed(0)
    for group in groups:  # a drawn model writes no verdicts: rewards are drawn instead
        group.rewards = [torch.rand(len(r), generator=g).round().tolist() for r in group.rewards]
    _, gradient = backward(method, groups)
    terms = []
    for group in groups:
        for sequences, rewards in zip(group.sequences, group.rewards, strict=True):
            for sequence, advantage in zip(sequences, group_advantage(torch.tensor(rewards)), strict=True):
                logits = method.model.lm(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
                t = range(sequence.thought.start, sequence.thought.stop)
                logprob = torch.stack([logits[i - 1, sequence.ids[i]] for i in t])
                terms.append(-advantage * logprob.mean())
    torch.stack(terms).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in method.model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", TEMPLATES)
def test_verdicts(folder: Path, name: str) -> None:
    """Scores of every response, and a report that counts what could not be read."""
    method, rows = make_method(folder, name), tiny_rows(folder)[:5]
    groups = method.scorer.score_groups(rows, votes=1, seed=0)
    assert marginal_scores(groups).shape == (5, 2)
    report = source_reports(groups, 0)[""]
    if name in ("gram", "genrm"):
        assert report.unparsable == 0 and 0 < (report.first_share or 0) < 1
        for group in groups:
            p = torch.tensor(group.scores).exp()
            assert p.sum().item() == pytest.approx(1)
    else:
        asked = sum(len(group.flat) for group in groups)
        assert report.unparsable == asked == 10 and report.accuracy == 0 and report.first_share is None


def test_an_unread_verdict_is_wrong_and_equal_orders_tie(folder: Path) -> None:
    method = make_method(folder, "grpo-pair")
    tokenizer = method.dialog.tokenizer
    a, b, junk = (tokenizer.encode(t) for t in ("<answer>[[A]]</answer>", "<answer>[[B]]</answer>", "ok"))

    class Says:
        float32 = True

        def __init__(self, says: list[list[int]]) -> None:
            self.says = says

        def sample(self, contexts: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[Thought]]:
            return [[Thought(list(ids), [0.0] * len(ids), True)] for ids in self.says[: len(contexts)]]

    def accuracy(*says: list[int]) -> float:
        runtime = Runtime(method.model, method.dialog, method.compute, method.layout, Says(list(says)))
        groups = ChoiceJudging(runtime, 1.0, 4).score_groups(tiny_rows(folder)[:1])
        return source_reports(groups, 0)[""].accuracy

    assert accuracy(a, b) == 1 and accuracy(b, a) == 0
    assert accuracy(a, a) == accuracy(b, b) == accuracy(a, junk) == accuracy(junk, b) == 0.5
    assert accuracy(junk, junk) == accuracy(b, junk) == 0
