"""`pairrm`: a scalar head on both responses in both orders; its likelihood on every format, its verdicts, a run."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from fakes import FakePolicy
from judging import make_policy, taken_gradients
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from dwrl_fast import Scorer
from dwrl_fast.data import Preference
from dwrl_fast.dialog.chat import user
from dwrl_fast.encode import both_orders
from dwrl_fast.evaluation.sources import source_reports
from dwrl_fast.feed import Feed, Shuffled
from dwrl_fast.progress import Display
from dwrl_fast.scoring import marginal_scores
from dwrl_fast.training.runlog import read_metrics
from dwrl_fast.training.trainer import Trainer

PAIR = Preference((user("3 1 4"),), ("7", "8"), source="rows:1")
MARGIN = Preference((user("2 7 1"),), ("4", "6"), margin=1.5, source="rows:2")
TIE = Preference((user("5 5"),), ("1", "2"), ranks=(1, 1), source="rows:3")
RANKING = Preference((user("6 0"),), ("3", "5", "9"), ranks=(1, 2, 2), source="rows:4")
ROWS = [PAIR, MARGIN, TIE, RANKING]


def lead(policy: FakePolicy, row: Preference, i: int, j: int) -> Tensor:
    """h with response i shown first and j second, computed on this sequence alone."""
    context = policy.dialog.context(row.prompt, [row.responses[i], row.responses[j]])
    found: Tensor = policy.model.lm(torch.tensor([context.ids])).logits[0, 0]
    return found


@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_loss_is_the_likelihood_in_both_orders(folder: Path, budget: int) -> None:
    policy = make_policy(folder, "pairrm")
    groups, _ = policy.rollout(ROWS)
    loss, gradients, metrics = policy.step(groups, budget=budget)
    figures = metrics.means()

    def nll(h: Tensor) -> Tensor:
        return torch.log1p((-h).exp())

    def tied(h: Tensor) -> Tensor:
        return (nll(h) + nll(-h)) / 2

    h = {
        (n, i, j): lead(policy, row, i, j)
        for n, row in enumerate(ROWS)
        for c in both_orders(row)
        for i, j in [c.places]
    }
    losses = [nll(h[0, 0, 1]), nll(-h[0, 1, 0]), nll(h[1, 0, 1] - 1.5), nll(-h[1, 1, 0] - 1.5)]
    losses += [tied(h[2, 0, 1]), tied(h[2, 1, 0])]
    losses += [nll(h[3, 0, 1]), nll(-h[3, 1, 0]), nll(h[3, 0, 2]), nll(-h[3, 2, 0])]
    losses += [tied(h[3, 1, 2]), tied(h[3, 2, 1])]
    total = torch.stack(losses).mean()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5) == figures["loss"]
    torch.testing.assert_close(gradients, taken_gradients(policy.model), rtol=1e-4, atol=1e-6)
    told = [h[0, 0, 1], -h[0, 1, 0], h[1, 0, 1], -h[1, 1, 0], h[3, 0, 1], -h[3, 1, 0], h[3, 0, 2], -h[3, 2, 0]]
    assert figures["train_accuracy"] == sum(x.item() > 0 for x in told) / 8


def test_a_verdict_is_of_both_orders(folder: Path) -> None:
    policy = make_policy(folder, "pairrm")
    groups = policy.judging.score_groups(ROWS)
    scores = marginal_scores(groups)
    for row, group, score in zip(ROWS, groups, scores, strict=True):
        with torch.no_grad():
            d = {c.places: (lead(policy, row, *c.places) - lead(policy, row, *c.places[::-1])).item() / 2
                 for c in both_orders(row)}  # fmt: skip
            first = [lead(policy, row, *c.places).sigmoid().item() for c in both_orders(row)]
        assert group.first_shares == pytest.approx(first, rel=1e-5)
        for i in range(len(row.responses)):
            won = [1 / (1 + math.exp(-d[i, j])) for j in range(len(row.responses)) if j != i]
            assert score[i].exp().item() == pytest.approx(sum(won) / len(won), rel=1e-5)
        if len(row.responses) == 2:
            assert (score[0] - score[1]).item() == pytest.approx(d[0, 1], abs=1e-5)
    report = source_reports(groups, 0)[""]
    assert 0 < (report.first_share or 0) < 1 and report.unparsable == 0


def test_a_head_that_only_looks_at_the_order_ties(folder: Path) -> None:
    policy = make_policy(folder, "pairrm")
    for parameter in policy.model.parameters():
        parameter.data.zero_()
    assert source_reports(policy.judging.score_groups(ROWS[:2]), 0)[""].accuracy == 0.5


def test_it_learns_and_loads_as_a_sequence_classifier(folder: Path) -> None:
    rows = [Preference((user(f"{i} 1"),), (str(i), str(i + 1)), source=f"rows:{i}") for i in range(8)]
    policy = make_policy(folder, "pairrm", learning_rate=1e-2, rollout_batch_size=8, minibatch_size=8, max_steps=25)
    (folder / "run").mkdir()
    feed = Feed([Shuffled("rows", rows, 0)], [1.0], batch_size=8, epochs=1, max_steps=25)
    trainer = Trainer(policy.method.config, policy.method, policy.judging, feed, rows, folder / "run", Display())
    result = trainer.train()
    log = read_metrics(folder / "run" / "metrics.jsonl")
    assert result["accuracy_after"] == 1 > result["accuracy_before"] and log[-1]["loss"] < 0.4 < log[0]["loss"]
    saved = folder / "run" / "model"
    scorer = Scorer.from_pretrained(saved, dtype="fp32")
    ours = scorer.score_groups(rows)
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    for group, row in zip(ours, rows, strict=True):
        orders = [policy.dialog.context(row.prompt, some).ids for some in (row.responses, row.responses[::-1])]
        with torch.no_grad():
            forth, back = (model(torch.tensor([ids])).logits.item() for ids in orders)
        (better,), (worse,) = group.scores
        assert better - worse == pytest.approx((forth - back) / 2, abs=1e-4)
    assert dataclasses.asdict(source_reports(ours, 0)[""])["accuracy"] == 1
