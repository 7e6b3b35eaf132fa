"""Every method's step on preference groups of all formats at once: pairs, a margin, a tie, rankings of five with ties.

The oracle runs the model on one sequence at a time, and writes out every order of a ranking.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakePolicy
from held_out import log_mean_exp
from orders import mean_order_loss
from tiny import RULE, tiny_config, tiny_folder
from torch import Tensor

from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.encode import Group
from dwrl_fast.feed import Feed, Shuffled
from dwrl_fast.progress import Display
from dwrl_fast.scoring import marginal_scores
from dwrl_fast.training.runlog import read_metrics
from dwrl_fast.training.trainer import Trainer

PROMPTS = ["3 5 0 0 4", "5 6 2 5 5", "4 3 2 5 1", "1 1 2 6 0", "0 2 4 4 3", "2 2 2 2 2"]
RANKS = [(), (), (1, 1), (), (1, 2, 2, 4, 5), (1, 1, 1)]
SIZES = [2, 2, 2, 5, 5, 3]
MARGINS = [0.0, 1.5, 0.0, 0.0, 0.0, 0.0]
ROWS = [
    Preference(({"role": "user", "content": prompt},), tuple("52718"[:size]), margin=margin, ranks=ranks)
    for prompt, ranks, size, margin in zip(PROMPTS, RANKS, SIZES, MARGINS, strict=True)
]


def make(folder: Path, name: str, packing: str) -> FakePolicy:
    tiny_folder(folder / "tiny")
    return FakePolicy(tiny_config(folder, method=name, packing=packing))


def step(policy: FakePolicy, phase: str, groups: list[Group], budget: int) -> tuple[list[Tensor], dict[str, float]]:
    """The gradients and figures of one minibatch, computed in micro-batches of `budget` tokens."""
    _, gradients, metrics = policy.step(groups, phase, budget)
    return list(gradients.values()), metrics.means()


def oracle_losses(marginals: list[Tensor]) -> Tensor:
    ranks = [row.ranks or tuple(range(len(row.responses))) for row in ROWS]
    return torch.stack([mean_order_loss(*each) for each in zip(marginals, ranks, MARGINS, strict=True)])


def shares(marginals: list[Tensor]) -> list[float]:
    """For each group except those in which all responses tie: the share of its pairs that are ordered correctly."""
    ranks = [row.ranks or tuple(range(len(row.responses))) for row in ROWS]
    return [share(*each) for each in zip(ranks, marginals, strict=True) if len(set(each[0])) > 1]


def share(ranks: Sequence[int], scores: Tensor) -> float:
    """The share of the pairs of unequal rank that the scores order correctly."""
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return sum(bool(scores[i] > scores[j]) for i, j in pairs) / len(pairs)


def compare(ours: list[Tensor], policy: FakePolicy, loss: Tensor) -> None:
    expected = torch.autograd.grad(loss, list(policy.model.parameters()), retain_graph=True)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-6 * other.abs().max().item() + 1e-8)
    assert max(g.abs().max() for g in ours) > 1e-4


@pytest.mark.parametrize(("packing", "budget"), [("tree", 10**6), ("tree", 1), ("padded", 10**6)])
def test_bt_on_mixed_groups(tmp_path: Path, packing: str, budget: int) -> None:
    policy = make(tmp_path, "bt", packing)
    groups = policy.rollout(ROWS)[0]
    ours, figures = step(policy, "score", groups, budget)
    rewards = [
        torch.stack([policy.model.lm(torch.tensor([q.ids])).logits[0, 0] for (q,) in group.sequences])
        for group in groups
    ]
    losses = oracle_losses(rewards)
    compare(ours, policy, losses.mean())
    best = torch.cat(
        [r[:1] if not row.ranks else r[: row.ranks.count(1)] for r, row in zip(rewards, ROWS, strict=True)]
    )
    assert figures["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert figures["reward_chosen"] == pytest.approx(best.mean().item(), rel=1e-4)
    others = (torch.cat(rewards).sum() - best.sum()) / (sum(SIZES) - len(best))
    assert figures["reward_rejected"] == pytest.approx(others.item(), rel=1e-4)
    assert figures["train_accuracy"] == pytest.approx(sum(shares(rewards)) / 4)


@pytest.mark.parametrize(("packing", "budget"), [("tree", 10**6), ("tree", 1), ("padded", 10**6)])
def test_dwrl_on_mixed_groups(tmp_path: Path, packing: str, budget: int) -> None:
    """Phase A against autograd of the likelihood. On-policy phase B against -c_k (w_ki - 1/n) / (n |o|)."""
    policy = make(tmp_path, "dwrl", packing)
    groups = policy.rollout(ROWS)[0]
    logps = [
        [
            [policy.model.lm(torch.tensor([q.ids])).logits[0].log_softmax(-1) for q in response]
            for response in g.sequences
        ]
        for g in groups
    ]
    scores = [torch.stack([torch.stack([x[-1, policy.dialog.yes_id] for x in r]) for r in group]) for group in logps]
    marginals = [s.exp().mean(-1).log() for s in scores]
    losses = oracle_losses(marginals)

    leaves = [m.detach().requires_grad_() for m in marginals]
    slopes = torch.autograd.grad(oracle_losses(leaves).sum(), leaves)
    thought = torch.zeros(())
    for group, each, logp, slope in zip(groups, scores, logps, slopes, strict=True):
        for k, response in enumerate(group.sequences):
            w = each[k].detach().softmax(-1)
            for i, sequence in enumerate(response):
                ids = torch.tensor(sequence.ids[sequence.thought])
                rows = logp[k][i][sequence.thought.start - 1 : sequence.thought.stop - 1]
                thought = thought + slope[k] * (w[i] - 1 / 3) / 3 * rows.gather(-1, ids[:, None]).mean()

    ours, figures = step(policy, "score", groups, budget)
    compare(ours, policy, losses.mean())
    p = [m.exp().detach() for m in marginals]
    best = [1 if not row.ranks else row.ranks.count(1) for row in ROWS]
    assert figures["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert figures["p_chosen"] == pytest.approx(torch.cat([x[:b] for x, b in zip(p, best, strict=True)]).mean().item())
    assert figures["p_rejected"] == pytest.approx(
        torch.cat([x[b:] for x, b in zip(p, best, strict=True)]).mean().item()
    )
    pulls = [-slope[:b].sum().item() for slope, b in zip(slopes, best, strict=True)]
    assert figures["misalignment"] == pytest.approx(sum(pulls) / 6, rel=1e-4)
    assert figures["train_accuracy"] == pytest.approx(sum(shares(marginals)) / 4)
    ours, _ = step(policy, "thought", groups, budget)
    compare(ours, policy, thought / len(groups))


@pytest.mark.parametrize("name", ["bt", "dpo", "dwrl"])
def test_nothing_to_compare_is_not_known_rather_than_wrong(tmp_path: Path, name: str) -> None:
    policy = make(tmp_path, name, "tree")
    groups = policy.rollout([ROWS[2], ROWS[5]])[0]
    _, _, metrics = policy.step(groups, "score")
    marginals = [torch.tensor(list(map(log_mean_exp, scores))).double() for scores in metrics.scores(groups)]
    losses = [mean_order_loss(m, ROWS[row].ranks, 0.0) for m, row in zip(marginals, (2, 5), strict=True)]
    assert math.isnan(metrics.means()["train_accuracy"])
    assert metrics.means()["loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["bt", "dwrl"])
def test_a_file_of_rankings_trains_and_is_learned(tmp_path: Path, name: str) -> None:
    """Rankings of five responses with a tie, from the file to the report. One group each; the last 8 are held out."""
    rng = np.random.default_rng(0)
    with (tmp_path / "rankings.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(32):
            responses = [str(digit) for digit in rng.choice(10, 5, replace=False)]
            order = sorted(RULE.index(digit) for digit in responses)
            ranks = [max(1, order.index(RULE.index(digit))) for digit in responses]  # the first two tie
            row = {"prompt": " ".join(map(str, rng.integers(0, 7, 5))), "responses": responses, "ranks": ranks}
            file.write(json.dumps(row) + "\n")
    tiny_folder(tmp_path / "tiny")
    config = tiny_config(tmp_path, method=name, max_steps=24, minibatch_size=4, learning_rate=2e-2)
    rows = read_preferences(tmp_path / "rankings.jsonl", rankings="plackett_luce").rows
    assert len(rows) == 32 and {row.ranks for row in rows} == {(1, 1, 2, 3, 4)}
    training, unseen = rows[:24], rows[24:]
    assert {row.prompt[0]["content"] for row in training}.isdisjoint(row.prompt[0]["content"] for row in unseen)
    run = tmp_path / "run"
    run.mkdir()
    policy = FakePolicy(config)
    feed = Feed([Shuffled("rankings", training, 0)], [1.0], batch_size=4, epochs=1, max_steps=24)
    trainer = Trainer(config, policy.method, policy.judging, feed, unseen, run, Display())
    trainer.resume()
    result = trainer.train()
    before, after = result["report_before"], result["report_after"]
    assert after["groups"] == 8 and after["low"] > before["high"]
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["train_accuracy"] > 0.75 and last["loss"] < 0.75 * math.log(120), "equal scores have log(5!)"
    marginals = marginal_scores(policy.judging.score_groups(unseen, votes=1, seed=0))
    expected = np.mean([share(row.ranks, scores) for row, scores in zip(unseen, marginals, strict=True)])
    assert after["accuracy"] == pytest.approx(expected)
