"""The training loop: micro-batches do not change its results, and a resumed run equals an uninterrupted one."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakePolicy
from held_out import share_won
from safetensors.torch import load_file
from tiny import ruled_pairs, tiny_config, tiny_pairs
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from dwrl_fast import Scorer
from dwrl_fast.batching.batch import Size
from dwrl_fast.batching.padded import padded_batch, split_padded
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import read_preferences
from dwrl_fast.encode import Group, plain_groups
from dwrl_fast.errors import CheckpointError, ConfigError, NotFiniteError
from dwrl_fast.feed import open_feed
from dwrl_fast.log import logger
from dwrl_fast.methods import StepMetrics
from dwrl_fast.progress import Display
from dwrl_fast.scoring import marginal_scores
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.plots import plot_curves
from dwrl_fast.training.runlog import RunLog, StallWatch, read_metrics
from dwrl_fast.training.trainer import Trainer

TIMED = ("seconds", "tokens_per_second", "share_")


def make_trainer(config: TrainConfig, run: Path, held_out: Path | None = None) -> Trainer:
    rows = [] if held_out is None else read_preferences(str(held_out)).rows
    assert not any(
        row.prompt == other.prompt for row in rows for other in read_preferences(str(config.dataset_name)).rows
    )
    run.mkdir(exist_ok=True)
    policy = FakePolicy(config)
    feed, _ = open_feed(config, policy.dialog, Display())
    trainer = Trainer(config, policy.method, policy.judging, feed, rows, run, Display())
    trainer.resume()
    return trainer


def roll(policy: FakePolicy, count: int = 4) -> list[Group]:
    rows = read_preferences(str(policy.method.config.dataset_name)).rows[:count]
    return policy.rollout(rows)[0]


def gradients(
    policy: FakePolicy, phase: str, groups: list[Group], budget: int = 10**6
) -> tuple[dict[str, Tensor], dict[str, float]]:
    _, found, metrics = policy.step(groups, phase, budget)
    return found, metrics.means()


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("phase", ["score", "thought", "joint"])
def test_micro_batches_and_order_change_nothing(folder: Path, phase: str) -> None:
    changes = {"alternate": "joint"} if phase == "joint" else {}
    policy = FakePolicy(tiny_config(folder, **changes))
    groups = roll(policy)
    whole, figures = gradients(policy, phase, groups)
    assert whole and max(g.abs().max() for g in whole.values()) > 1e-6
    for cut, budget in ((groups, 1), (groups[::-1], 500)):
        parts, same = gradients(policy, phase, cut, budget)
        for name, expected in whole.items():
            # In another order, sums differ by ulps of their terms, which may be larger than the sum.
            size = expected.abs().max().item()
            torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-7 + 2e-6 * size)
        assert same == pytest.approx(figures, rel=1e-4, abs=1e-6, nan_ok=True)


def test_phase_a_is_bradley_terry_through_the_model(folder: Path) -> None:
    """docs/method.md 2.2, point 1, end to end: autograd through the marginals of the model's scores."""
    policy = FakePolicy(tiny_config(folder))
    groups = roll(policy)
    ours, figures = gradients(policy, "score", groups)
    batch = padded_batch(groups, policy.dialog.pad_id, torch.device("cpu"))
    logits = policy.model.lm(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    s = logits[batch.score_rows].log_softmax(-1)[:, policy.dialog.yes_id]
    marginals = batch.grid(s).logsumexp(-1)
    loss = -torch.nn.functional.logsigmoid(marginals[:, 0] - marginals[:, 1]).mean()
    policy.model.zero_grad()
    loss.backward()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_phase_b_is_the_clipped_policy_gradient_through_the_model(folder: Path) -> None:
    """Computed separately from docs/method.md, 2. The policy changed after sampling, so ratios and the clip matter."""
    policy = FakePolicy(tiny_config(folder, epsilon=0.1, epsilon_high=0.3))
    groups = roll(policy)
    with torch.no_grad():
        for drawn in policy.model.parameters():
            drawn.add_(0.05 * torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0)))
    ours, figures = gradients(policy, "thought", groups)
    total = torch.zeros(())
    for group in groups:
        logps = [[policy.model.lm(torch.tensor([q.ids])).logits[0].log_softmax(-1) for q in r] for r in group.sequences]
        p = torch.stack([torch.stack([logp[-1, policy.dialog.yes_id] for logp in r]) for r in logps]).exp().detach()
        m = p[1].mean() / p.mean(-1).sum()
        for k, sign in ((0, 1), (1, -1)):
            for i, sequence in enumerate(group.sequences[k]):
                advantage = sign * (p[k, i] / p[k].sum() - 1 / 3)
                span = sequence.thought
                ids = torch.tensor(sequence.ids[span])
                new = logps[k][i][span.start - 1 : span.stop - 1].gather(-1, ids[:, None]).squeeze(-1)
                g = (new - torch.tensor(group.thoughts[k][i].logprobs)).exp()
                gain = torch.minimum(g * advantage, g.clamp(0.9, 1.3) * advantage).mean()
                total = total - m / 3 * gain / len(groups)
    policy.model.zero_grad()
    total.backward()
    assert 0.05 < figures["clip_fraction"] < 0.95
    assert figures["thought_loss"] == pytest.approx(total.item(), rel=1e-4)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_joint_is_both_phases_in_one_when_centred(folder: Path) -> None:
    groups = roll(FakePolicy(tiny_config(folder)))
    joint = gradients(
        FakePolicy(tiny_config(folder, alternate="joint", joint_reward="centred")), "joint", groups, 10**6
    )[0]
    apart = FakePolicy(tiny_config(folder))
    a, b = (gradients(apart, phase, groups)[0] for phase in ("score", "thought"))
    for name, both in joint.items():
        torch.testing.assert_close(both, a[name] + b[name], rtol=1e-4, atol=1e-7)


def test_recomputed_old_logprobs_are_the_samplers_in_float32(folder: Path) -> None:
    rows = read_preferences(str(folder / "pairs.jsonl")).rows
    sampled = FakePolicy(tiny_config(folder, old_logprobs="sampler")).rollout(rows)[0]
    again, logs = FakePolicy(tiny_config(folder, old_logprobs="recompute")).rollout(rows)
    flat = [
        torch.tensor([lp for g in groups for row in g.thoughts for t in row for lp in t.logprobs])
        for groups in (sampled, again)
    ]
    gap = (flat[0] - flat[1]).abs().max().item()
    assert logs["sampler_gap_max"] == pytest.approx(gap) and gap < 2e-5


def test_truncated_thoughts_are_scored_and_masked(folder: Path) -> None:
    policy = FakePolicy(tiny_config(folder, max_completion_length=2))
    groups = roll(policy)
    kept, masked = (
        padded_batch(groups, policy.dialog.pad_id, torch.device("cpu"), mask_truncated=mask) for mask in (False, True)
    )
    ended = torch.tensor([t.ended for g in groups for row in g.thoughts for t in row])
    assert kept.trained.all() and torch.equal(masked.trained, ended) and not ended.all()
    a, b = StepMetrics(), StepMetrics()
    policy.method.loss("thought", policy.model, kept, Size.of(kept.groups), a)
    policy.method.loss("thought", policy.model, masked, Size.of(masked.groups), b)
    assert b.means()["trained_tokens"] < a.means()["trained_tokens"]
    assert a.means()["advantage"] == b.means()["advantage"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alternate": "rollout", "optimizer_state": "per_phase"},
        {"alternate": "joint", "dtype": "bf16"},
        {"method": "bt"},
    ],
)
def test_resume_to_the_bit_at_three_points(folder: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(folder, save_steps=1, eval_votes=0, **changes)
    unseen = tiny_pairs(folder / "unseen.jsonl", 4, seed=1)
    make_trainer(config, folder / "whole", unseen).train()
    expected, log = weights(folder / "whole"), read_metrics(folder / "whole" / "metrics.jsonl")
    for step in (1, 2, 3):
        run = folder / f"resumed-{step}"
        path = folder / "whole" / f"checkpoint-{step:06d}"
        result = make_trainer(dataclasses.replace(config, resume_from_checkpoint=str(path)), run, unseen).train()
        assert all(torch.equal(expected[name], p) for name, p in weights(run).items())
        again = read_metrics(run / "metrics.jsonl")
        assert [row["step"] for row in again] == list(range(step + 1, 5))
        for theirs, ours in zip(log[step:], again, strict=True):
            assert {k: v for k, v in theirs.items() if not k.startswith(TIMED)} == {
                k: v for k, v in ours.items() if not k.startswith(TIMED)
            }
        assert (
            result["accuracy_before"] == json.loads((path / "state.json").read_text())["before"]["greedy"]["accuracy"]
        )


def test_a_killed_run_goes_on_in_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(folder, save_steps=2)
    make_trainer(config, folder / "whole").train()
    killed = make_trainer(config, folder / "run")
    with monkeypatch.context() as patch:
        patch.setattr(killed, "save", lambda: Trainer.save(killed) if killed.step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            killed.train()
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    (folder / "run" / "checkpoint-000004.unfinished").mkdir()  # left by a SIGKILL during that save
    resumed = dataclasses.replace(config, resume_from_checkpoint="latest", output_dir="run")
    make_trainer(resumed, folder / "run").train()
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert all(torch.equal(p, weights(folder / "whole")[name]) for name, p in weights(folder / "run").items())


@pytest.mark.parametrize("minutes", [0.5, 0.1, 60.0])
def test_a_run_with_a_budget_ends_at_a_step(folder: Path, minutes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of this test a step takes 10 seconds. There are 3 steps in half a minute, and one step if the time
    is too short for it. The learning rate falls with the time, or with the rows if these end first.
    """
    now = [0.0]
    monkeypatch.setattr("dwrl_fast.training.trainer.time", SimpleNamespace(monotonic=lambda: now[0]))
    config = tiny_config(folder, save_steps=1, max_minutes=minutes, learning_rate=1e-3)

    def timed(config: TrainConfig, run: str) -> list[dict[str, Any]]:
        trainer = make_trainer(config, folder / run)
        rollout = trainer.rollout

        def slow(*given: Any) -> Any:
            now[0] += 10
            return rollout(*given)

        monkeypatch.setattr(trainer, "rollout", slow)
        assert trainer.train()["steps"] == trainer.step
        return read_metrics(folder / run / "metrics.jsonl")

    log = timed(config, "whole")
    steps = {0.5: 3, 0.1: 1, 60.0: 4}[minutes]
    used = [max(10 * i / (60 * minutes), (2 * i + 1) / 8) for i in range(steps)]  # at the last minibatch of a step
    assert [row["learning_rate_score"] for row in log] == pytest.approx([1e-3 * (1 - share) for share in used])
    assert sorted(path.name for path in (folder / "whole").glob("checkpoint-*"))[-1] == f"checkpoint-{steps:06d}"
    if steps == 3:
        path = folder / "whole" / "checkpoint-000002"
        again = timed(dataclasses.replace(config, resume_from_checkpoint=str(path)), "resumed")
        assert [row["step"] for row in again] == [3] and again[0]["loss"] == log[2]["loss"]


def test_another_runs_checkpoint_is_refused(folder: Path) -> None:
    config = tiny_config(folder, save_steps=1, max_steps=2)
    make_trainer(config, folder / "run").train()
    other = dataclasses.replace(config, seed=1, resume_from_checkpoint=str(folder / "run" / "checkpoint-000001"))
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        make_trainer(other, folder / "other").train()
    other = dataclasses.replace(other, seed=0, score_normalization="yes_no")
    with pytest.raises(CheckpointError, match="score_normalization was 'vocab', is 'yes_no'"):
        make_trainer(other, folder / "other").train()
    (folder / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text().replace("user", "assistant", 1))
    with pytest.raises(CheckpointError, match=r"the data set: its rows, .* is different"):
        make_trainer(dataclasses.replace(other, score_normalization="vocab"), folder / "other").train()
    tiny_pairs(folder / "pairs.jsonl")
    earlier = dataclasses.replace(config, resume_from_checkpoint=str(folder / "run" / "checkpoint-000001"))
    with pytest.raises(CheckpointError, match="checkpoint-000002"):
        make_trainer(earlier, folder / "run").train()


def test_nan_stops_before_the_step(folder: Path) -> None:
    trainer = make_trainer(tiny_config(folder), folder / "run")
    groups = trainer.rollout(trainer.feed.next(), 0, Display())[0]
    with torch.no_grad():
        trainer.policy.model.lm.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    before = {name: p.clone() for name, p in trainer.policy.model.named_parameters()}
    with pytest.raises(NotFiniteError, match=r"step 1, minibatch 1, phase score.*pairs\.jsonl:1"):
        trainer.update("score", trainer.policy.pack(groups, 4)[0], 0)
    for name, p in trainer.policy.model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num())


def test_bt_learns_and_loads_as_a_sequence_classifier(folder: Path) -> None:
    config = tiny_config(
        folder, method="bt", max_steps=40, rollout_batch_size=12, minibatch_size=12, learning_rate=2e-2
    )
    ruled_pairs(folder / "pairs.jsonl", "train", 480)
    unseen = ruled_pairs(folder / "unseen.jsonl", "test", 64)
    trainer = make_trainer(config, folder / "run", unseen)
    result = trainer.train()
    log = read_metrics(folder / "run" / "metrics.jsonl")
    assert result["report_after"]["low"] > result["report_before"]["high"]
    assert result["accuracy_after"] == share_won(folder / "run" / "model", unseen)
    assert log[-1]["loss"] < 0.4 < log[0]["loss"]
    groups = plain_groups(trainer.held_out, trainer.method.dialog)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run" / "model")
    batch = padded_batch(groups, trainer.method.dialog.pad_id, torch.device("cpu"))
    with torch.no_grad():
        theirs = model(batch.input_ids, attention_mask=batch.attention_mask).logits.squeeze(-1)
    scorer = Scorer.from_pretrained(folder / "run" / "model", dtype="fp32")
    ours = marginal_scores(scorer.score_groups(trainer.held_out))
    torch.testing.assert_close(ours.flatten().float(), theirs, rtol=1e-5, atol=1e-5)


def test_dwrl_learns_scores(folder: Path) -> None:
    config = tiny_config(folder, max_steps=40, rollout_batch_size=12, minibatch_size=12, learning_rate=1e-2)
    ruled_pairs(folder / "pairs.jsonl", "train", 480)
    unseen = ruled_pairs(folder / "unseen.jsonl", "test", 160)
    result = make_trainer(config, folder / "run", unseen).train()
    assert result["report_after"]["low"] > result["report_before"]["high"]
    assert result["accuracy_after"] == share_won(folder / "run" / "model", unseen)
    row = read_metrics(folder / "run" / "metrics.jsonl")[-1]
    wanted = (
        "loss score_loss thought_loss p_chosen p_rejected misalignment effective_groups advantage ratio clip_fraction "
        "entropy thought_length truncation_rate label_mass grad_norm_score grad_norm_thought tokens_per_second "
        "share_rollout"
    )
    assert set(wanted.split()) <= set(row) and all(np.isfinite(row[name]) for name in wanted.split())
    thoughts = (folder / "run" / "thoughts" / "step-000040.jsonl").read_text().splitlines()
    assert len(thoughts) == 12 * 2 * 3 and set(json.loads(thoughts[0])) >= {"source", "response", "thought", "score"}
    plot_curves(read_metrics(folder / "run" / "metrics.jsonl"), folder / "curves.png", "test")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bf16_computes_over_float32_masters(folder: Path) -> None:
    config = tiny_config(folder, dtype="bf16")
    policy = FakePolicy(config)
    groups = roll(policy)
    exact = FakePolicy(tiny_config(folder))
    fine = gradients(exact, "score", groups)[0]
    coarse = gradients(policy, "score", groups)[0]
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
    norm, gap = (
        torch.cat([g.flatten() for g in each]).norm()
        for each in (fine.values(), [coarse[n] - g for n, g in fine.items()])
    )
    assert 1e-5 < gap / norm < 0.1, "bf16 must be at work, and close"
    _, logs = policy.rollout(read_preferences(str(folder / "pairs.jsonl")).rows)
    with pytest.raises(ConfigError, match="--old_logprobs sampler"):
        FakePolicy(tiny_config(folder, dtype="bf16", old_logprobs="sampler"))
    assert logs["sampler_gap_max"] > 0, "old log-probs are recomputed when the sampler is not float32"


def test_rewards_are_float32_under_bf16(folder: Path) -> None:
    """If rewards were rounded to bfloat16, different responses would tie."""
    config = tiny_config(folder, method="bt", dtype="bf16")
    policy = FakePolicy(config)
    policy.rollout(read_preferences(str(folder / "pairs.jsonl")).rows)
    batch = padded_batch(
        plain_groups(read_preferences(str(folder / "pairs.jsonl")).rows, policy.dialog), 0, torch.device("cpu")
    )
    with policy.runtime.compute.autocast(), torch.no_grad():
        rewards = policy.model(batch)
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, rewards.bfloat16().float())


def test_dropout_is_off(folder: Path) -> None:
    path = folder / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.5}))
    policy = FakePolicy(tiny_config(folder, old_logprobs="recompute"))
    policy.model.train()
    logs = policy.rollout(read_preferences(str(folder / "pairs.jsonl")).rows)[1]
    assert logs["sampler_gap_max"] < 2e-5


def test_per_phase_state_and_rates(folder: Path) -> None:
    def made(config: TrainConfig) -> Optimizers:
        policy = FakePolicy(config)
        return Optimizers(policy.model, policy.method, config, total=10)

    config = tiny_config(folder, optimizer_state="per_phase", score_learning_rate=1e-3, warmup_steps=2)
    optimizers = made(config)
    assert optimizers.of_phase["score"] is not optimizers.of_phase["thought"]
    assert optimizers.rates == {"score": 1e-3, "thought": 1e-2}
    shared = made(tiny_config(folder))
    assert shared.of_phase["score"] is shared.of_phase["thought"]
    assert len(optimizers.tensors()) == 2 * len(shared.tensors())
    assert [optimizers.factor(m) for m in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    cosine = dataclasses.replace(config, lr_scheduler_type="cosine", warmup_steps=0, min_learning_rate_ratio=0.1)
    factors = [made(cosine).factor(m) for m in (0, 5, 10)]
    assert factors == pytest.approx([1.0, 0.55, 0.1])


def test_groups_are_never_split(folder: Path) -> None:
    groups = roll(FakePolicy(tiny_config(folder)), 12)
    for budget in (1, 300):
        batches = split_padded(groups, budget)
        assert sorted(id(g) for batch in batches for g in batch) == sorted(map(id, groups))
        for batch in batches:
            size = sum(len(g.flat) for g in batch) * max(g.longest for g in batch)
            assert size <= budget or len(batch) == 1


@pytest.mark.parametrize(
    "change, said",
    [
        ({"advantage": 1e-5}, "all score alike"),
        ({"effective_groups": 1.0}, "contribute to the gradient"),
        ({}, None),
        ({"advantage": 0.0, "loss": 0.01}, None),
    ],
)
def test_stalls_are_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, change: dict[str, float], said: str | None
) -> None:
    healthy = {"advantage": 0.1, "loss": 0.6, "effective_groups": 30.0, "p_chosen": 0.9, "p_rejected": 0.9}
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    watch = StallWatch()
    for _ in range(12):
        watch.update(healthy | change, minibatch_size=32)
    stalls = [record.getMessage() for record in caplog.records]
    assert len(stalls) == (said is not None) and all(said in message for message in stalls if said)


def test_log_drops_what_lies_past_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.metrics(step, {"loss": 0.5})
    with log.metrics_path.open("a") as file:
        file.write('{"step": 4, "lo')
    RunLog(tmp_path, resumed_at=2)
    assert [row["step"] for row in read_metrics(log.metrics_path)] == [1, 2]


def test_every_packing_trains_alike(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs, models = {}, {}
    for packing in ("tree", "packed", "padded"):
        config = tiny_config(folder, packing=packing, max_steps=2, learning_rate=1e-3)
        with caplog.at_level("INFO", logger="dwrl_fast"):
            make_trainer(config, folder / packing).train()
        logs[packing], models[packing] = read_metrics(folder / packing / "metrics.jsonl"), weights(folder / packing)
    counts = {p: {k: log[0][k] for k in ("trunk_tokens", "naive_tokens", "padding")} for p, log in logs.items()}
    naive = counts["tree"]["naive_tokens"]
    assert counts["tree"]["padding"] == 0 and counts["tree"]["trunk_tokens"] < 0.7 * naive
    assert counts["packed"] == {"trunk_tokens": naive, "naive_tokens": naive, "padding": 0}
    assert counts["padded"]["trunk_tokens"] - counts["padded"]["padding"] == counts["padded"]["naive_tokens"] == naive
    assert f"backbone computes {counts['tree']['trunk_tokens']:,} tokens for sequences of {naive:,}" in caplog.text
    for packing in ("packed", "padded"):
        for ours, theirs in zip(logs["tree"], logs[packing], strict=True):
            for name in ("loss", "score_loss", "thought_loss", "ratio", "entropy", "label_mass", "head_rows"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
        for name, weight in models["tree"].items():
            # AdamW divides a tiny gradient by itself, so its step has either sign and may be as large as the learning
            # rate.
            torch.testing.assert_close(weight, models[packing][name], rtol=1e-4, atol=1e-3)
