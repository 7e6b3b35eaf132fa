"""`sft` and `dpo`: losses on every preference format and on demonstrations, scores, and learning."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chats import applied, encoded, real_tokenizer
from fakes import FakePolicy
from judging import DIRECT, PAIRWISE, POINTWISE, logprobs, save, shake, single_turn
from test_methods import ROWS, SIZES, compare, oracle_losses, shares
from tiny import tiny_config, tiny_dialog, tiny_rows

from dwrl_fast import Scorer
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Demonstration, Message, Preference, read_preferences
from dwrl_fast.data.mixture import Part
from dwrl_fast.dialog import Dialog, read_score, write_score
from dwrl_fast.embedded.task import draw_claims, prompts, write_pairs
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import Group, demonstration_group, fit
from dwrl_fast.errors import ConfigError, DataError
from dwrl_fast.evaluation.sources import source_reports
from dwrl_fast.feed import Feed, Shuffled, open_feed, read_rows
from dwrl_fast.feed.source import content_hash
from dwrl_fast.methods import METHODS
from dwrl_fast.progress import Display
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.templates import Template
from dwrl_fast.training.checkpoint import checkpoints
from dwrl_fast.training.runlog import read_metrics
from dwrl_fast.training.trainer import Trainer

LAYOUTS = [("tree", 10**6), ("tree", 1), ("padded", 10**6)]
ASKED: tuple[Message, ...] = ({"role": "user", "content": "3 5 0 0 4"},)
GOOD = Demonstration(ASKED, ("7",), thought="3 5 ok", verdict="Yes")
BAD = Demonstration(ASKED, ("2 1",), thought="bad", verdict="No", source="x:2")


@pytest.mark.parametrize(("packing", "budget"), LAYOUTS)
def test_dpo_on_mixed_groups(folder: Path, packing: str, budget: int) -> None:
    """The likelihoods of pairs, a margin, ties and rankings, for the rewards beta log (pi / pi_ref)."""
    policy = FakePolicy(tiny_config(folder, method="dpo", packing=packing))
    groups, _ = policy.rollout(ROWS)
    with torch.no_grad():
        before = [torch.stack([logprobs(policy.model, q).sum() for q in group.flat]) for group in groups]
    shake(policy.model)
    after = [torch.stack([logprobs(policy.model, q).sum() for q in group.flat]) for group in groups]
    rewards = [0.22 * (a - b) for a, b in zip(after, before, strict=True)]
    losses = oracle_losses(rewards)
    _, ours, metrics = policy.step(groups, budget=budget)
    figures = metrics.means()
    compare(list(ours.values()), policy, losses.mean())
    assert figures["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert figures["train_accuracy"] == pytest.approx(sum(shares(rewards)) / 4)
    best = torch.cat([r[: row.ranks.count(1) or 1] for r, row in zip(rewards, ROWS, strict=True)])
    assert figures["reward_chosen"] == pytest.approx(best.mean().item(), rel=1e-4)
    others = (torch.cat(rewards).sum() - best.sum()) / (sum(SIZES) - len(best))
    assert figures["reward_rejected"] == pytest.approx(others.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
def test_completions_of_real_tokenizers(shared: Path, name: str) -> None:
    """The ids before the trained ones are the model's input when it answers. The trained ids end the turn."""
    tokenizer = real_tokenizer(shared, name)
    dialog = Dialog(tokenizer)
    sequence = dialog.completion(ASKED, "It is six, as 3 + 3 = 6.")
    assert sequence.ids[: sequence.thought.start] == applied(tokenizer, list(ASKED))
    assert sequence.ids[sequence.thought] == [*encoded(tokenizer, "It is six, as 3 + 3 = 6."), dialog.end_id]
    assert sequence.thought.stop == len(sequence.ids) and sequence.rate.start == sequence.rate.stop
    plain = dialog.plain(ASKED, "It is six, as 3 + 3 = 6.")
    assert plain == replace(sequence, thought=sequence.rate)


@pytest.mark.parametrize(("packing", "budget"), LAYOUTS)
def test_sft_on_mixed_groups(folder: Path, packing: str, budget: int) -> None:
    """The best response of each row, or all best ones if several tie. The mean is over tokens."""
    rows = [replace(row, responses=("7 1 3", *row.responses[1:])) for row in ROWS]  # several tokens
    policy = FakePolicy(tiny_config(folder, method="sft", packing=packing))
    groups, _ = policy.rollout(rows)
    assert [len(group.flat) for group in groups] == [1, 1, 2, 1, 1, 3]
    decoded = [policy.dialog.tokenizer.decode(q.ids[q.thought]) for q in groups[2].flat]
    assert [text.split() for text in decoded] == [["7", "1", "3", "<|end|>"], ["2", "<|end|>"]]
    mean = torch.cat([logprobs(policy.model, q) for group in groups for q in group.flat]).mean()
    _, ours, metrics = policy.step(groups, budget=budget)
    compare(list(ours.values()), policy, -mean)
    assert metrics.means()["loss"] == pytest.approx(-mean.item(), rel=1e-5)


@pytest.mark.parametrize(("packing", "budget"), LAYOUTS)
def test_sft_on_demonstrations_and_pairs(folder: Path, packing: str, budget: int) -> None:
    """The loss is one mean over the thought, end token and label of each demonstration and the best response of each
    pair.
    """
    policy = FakePolicy(tiny_config(folder, method="sft", packing=packing))
    groups, _ = policy.rollout([GOOD, ROWS[0], BAD])
    dialog, decode = policy.dialog, policy.dialog.tokenizer.decode
    assert [decode(g.flat[0].ids[g.flat[0].thought]).split() for g in groups] == [
        ["3", "5", "ok", "<|end|>"],
        ["5", "<|end|>"],
        ["bad", "<|end|>"],
    ]
    terms = [logprobs(policy.model, group.flat[0]) for group in groups]
    for group, label in ((groups[0], dialog.yes_id), (groups[2], dialog.no_id)):
        terms.append(policy.model.lm(torch.tensor([group.flat[0].ids])).logits[0, -1].log_softmax(-1)[label][None])
    assert sum(map(len, terms)) == 10
    _, ours, _ = policy.step(groups, budget=budget)
    compare(list(ours.values()), policy, -torch.cat(terms).mean())


def test_demonstrations_of_single_turns() -> None:
    """The verdict is written in the form in which it is read. A template of kind `direct` has no thought."""
    decode = make_tokenizer().decode

    def group(template: Template, row: Demonstration) -> Group:
        return demonstration_group(row, single_turn(template))

    def written(template: Template, row: Demonstration) -> list[str]:
        (sequence,) = group(template, row).flat
        return decode(sequence.ids[sequence.thought]).split()

    two = replace(GOOD, responses=("7", "2"), verdict="B")
    assert written(PAIRWISE, two) == ["3", "5", "ok", "<answer>[[B]]</answer>", "<|end|>"]
    own = replace(two, thought="ok <answer>[[A]]</answer>", verdict="")
    assert written(PAIRWISE, own) == ["ok", "<answer>[[A]]</answer>", "<|end|>"]
    number = replace(GOOD, thought="ok <s> 7 </s>", verdict="")
    assert written(POINTWISE, number) == ["ok", "<s>", "7", "</s>", "<|end|>"]
    assert read_score(write_score("7.5")) == 7.5
    direct = group(DIRECT, replace(two, thought=""))
    assert direct.labels == [1] and direct.flat[0].thought.start == direct.flat[0].thought.stop


@pytest.mark.parametrize(
    ("template", "changes", "reason"),
    [
        (None, {"verdict": "yes"}, "the verdict is not one of the template's labels, Yes and No"),
        (None, {"responses": ("7", "2")}, "not 1 responses, the number that a template of kind dialog shows"),
        (None, {"thought": "ok " * 40}, "longer than --max_length 40 tokens"),
        (
            PAIRWISE,
            {"responses": ("7", "2"), "verdict": "C"},
            "the verdict is not one that a template of kind pairwise",
        ),
        (PAIRWISE, {"responses": ("7", "2"), "verdict": ""}, "no verdict, neither as a column nor at the end"),
        (POINTWISE, {"verdict": "11"}, "the verdict is not one that a template of kind pointwise asks for"),
        (
            DIRECT,
            {"responses": ("7", "2"), "verdict": "A"},
            "the row has a thought, but a template of kind direct has none",
        ),
    ],
)
def test_demonstrations_that_do_not_fit(template: Template | None, changes: dict[str, Any], reason: str) -> None:
    dialog = tiny_dialog() if template is None else single_turn(template)
    tokens, said = fit(replace(GOOD, **changes), dialog, 40)
    assert tokens == 0 and said.startswith(reason)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_reading_demonstrations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "3 5", "response": "7", "thought": "ok", "verdict": "Yes", "aspect": "correctness"},
        {"response": turns, "thought": "", "verdict": " No "},
        {"prompt": "3 5", "responses": ["7", "2"], "thought": "so", "verdict": 7.0},
        {"prompt": "3 5", "response": "7", "thought": None, "verdict": "Yes"},
        {"prompt": "3 5", "responses": ["7", None], "thought": "so", "verdict": "A"},
    )
    found = read_preferences(path)
    first, second, third = found.rows
    assert found.format == "DEMONSTRATION" and set(found.dropped) == {"null thought", "null response"}
    user = {"role": "user", "content": "3 5"}
    wanted = Demonstration((user,), ("7",), aspect="correctness", source=f"{path}:1", thought="ok", verdict="Yes")  # type: ignore[arg-type]
    assert first == wanted
    assert isinstance(second, Demonstration) and (second.prompt, second.responses) == ((turns[0],), ("Hello!",))
    assert (second.thought, second.verdict) == ("", "No")
    assert isinstance(third, Demonstration) and (third.responses, third.verdict) == (("7", "2"), "7")
    assert (
        content_hash([GOOD])
        != content_hash([replace(GOOD, thought="3")])
        != content_hash([replace(GOOD, verdict="No")])
    )
    assert read_preferences(path, columns={"thought": "verdict"}, limit=1).rows[0].thought == "Yes"  # type: ignore[attr-defined]
    for wrong in ({"thought": 3, "verdict": "A"}, {"thought": "a", "verdict": [1]}, {"thought": "a", "verdict": True}):
        with pytest.raises(DataError, match=r"wrong.jsonl:1: '\w+' should hold"):
            read_preferences(write(tmp_path / "wrong.jsonl", {"prompt": "3", "response": "7"} | wrong))


@pytest.mark.parametrize("streaming", [False, True])
def test_only_sft_takes_demonstrations(folder: Path, streaming: bool) -> None:
    rows = [{"prompt": "3 5", "response": "7", "thought": "ok", "verdict": "Yes"}] * 4
    path = str(write(folder / "pairs.jsonl", *rows))

    def first(method: str) -> Preference:
        config = tiny_config(folder, method=method, streaming=streaming, shuffle_buffer_size=2)
        return open_feed(config, load_dialog(config), Display())[0].next()[0]

    assert isinstance(first("sft"), Demonstration)
    for method in ("dwrl", "dpo", "bt"):
        with pytest.raises(
            DataError, match=r"pairs.jsonl:1: a judgement with its thought and verdict. Only --method sft"
        ):
            first(method)
    config = tiny_config(folder, method="sft")
    with pytest.raises(DataError, match="no model is evaluated on them"):
        read_rows((Part(path),), config, load_dialog(config), Display())


def run(folder: Path, config: TrainConfig, rows: list[Preference], held_out: list[Preference]) -> dict[str, Any]:
    folder.mkdir()
    policy = FakePolicy(config)
    size, steps = config.rollout_batch_size, config.max_steps
    feed = Feed([Shuffled("rows", rows, 0)], [1.0], batch_size=size, epochs=1, max_steps=steps)
    trainer = Trainer(config, policy.method, policy.judging, feed, held_out, folder, Display())
    trainer.resume()
    return trainer.train()


def test_dpo_goes_on_from_a_checkpoint_with_the_first_reference(folder: Path) -> None:
    rows = list(tiny_rows(folder))
    config = tiny_config(folder, method="dpo", save_steps=2)
    run(folder / "whole", config, rows, [])
    checkpoint = checkpoints(folder / "whole")[0]
    run(folder / "later", replace(config, resume_from_checkpoint=str(checkpoint)), rows, [])
    whole, later = (read_metrics(folder / name / "metrics.jsonl") for name in ("whole", "later"))
    assert [row["step"] for row in later] == [3, 4] and later[-1]["reward_chosen"] != 0
    for one, other in zip(whole[2:], later, strict=True):
        assert all(one[name] == other[name] for name in ("loss", "reward_chosen", "grad_norm_policy"))
    weights = [(folder / name / "model/model.safetensors").read_bytes() for name in ("whole", "later")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("kind", "after"), [("dialog", "dwrl"), ("pairwise", "grpo-pair")])
def test_a_judge_warmed_up_and_trained_on(folder: Path, kind: str, after: str) -> None:
    """sft on judgements, then another method that starts from its folder and finds the template there."""
    template = folder / "template.yaml"
    rows = [GOOD, BAD] * 4
    if kind == "pairwise":
        asks = f"{PAIRWISE.evaluate} {{aspect}} <answer>[[A]]</answer> <answer>[[B]]</answer>"
        template.write_text(yaml.safe_dump({"kind": kind, "evaluate": asks}), encoding="utf-8")
        rows = [replace(row, responses=("7", "2"), verdict=v) for row, v in zip(rows, "AB" * 4, strict=True)]
    options = {"template": str(template)} if kind == "pairwise" else {}
    config = tiny_config(folder, method="sft", max_steps=12, learning_rate=2e-2, **options)
    run(folder / "sft", config, list(rows), [])
    losses = [row["loss"] for row in read_metrics(folder / "sft/metrics.jsonl")]
    assert losses[-1] < losses[0] / 2
    config = tiny_config(folder, method=after, model_name_or_path=str(folder / "sft/model"))
    assert load_dialog(config).template.kind == kind
    FakePolicy(config)


def test_the_template_is_one_that_sft_can_learn(folder: Path) -> None:
    with pytest.raises(ConfigError, match="kind dialog or pairwise or pointwise or direct"):
        load_dialog(tiny_config(folder, method="sft", template="rationalizer"))


def test_dpo_scores_are_implicit_rewards(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are 0 before training. After it, they equal the formula, also with the saved folder. A missing reference
    gives a warning.
    """
    policy = FakePolicy(tiny_config(folder, method="dpo", beta=0.5))
    groups = policy.judging.score_groups(ROWS)
    assert all(score == 0 for group in groups for (score,) in group.scores)
    shake(policy.model)
    save(folder / "model", policy)
    after = policy.judging.score_groups(ROWS)
    base = FakePolicy(tiny_config(folder, method="sft"))
    for found in after:
        for (score,), q in zip(found.scores, found.group.flat, strict=True):
            wanted = 0.5 * (logprobs(policy.model, q).sum() - logprobs(base.model, q).sum())
            assert score == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
    assert not any(found.token_scores for found in after)

    def saved() -> list[list[list[float]]]:
        scorer = Scorer.from_pretrained(folder / "model", dtype="fp32", token_budget=10**6)
        return [group.scores for group in scorer.score_groups(ROWS)]

    for one, other in zip(saved(), after, strict=True):
        assert [score for (score,) in one] == pytest.approx([score for (score,) in other.scores])
    shutil.rmtree(folder / "tiny")
    for one, other in zip(saved(), after, strict=True):
        for (score,), q in zip(one, other.group.flat, strict=True):
            assert score == pytest.approx(0.5 * logprobs(policy.model, q).sum().item(), rel=1e-4)
    assert "the model that this one was trained from is not found" in caplog.text


def test_with_adapters_the_reference_is_the_model_without_them(folder: Path) -> None:
    policy = FakePolicy(tiny_config(folder, method="dpo", use_peft=True, lora_r=2))
    base = FakePolicy(tiny_config(folder, method="sft"))
    assert all(score == 0 for group in policy.judging.score_groups(ROWS) for (score,) in group.scores)
    shake(policy.model, 0.2)
    save(folder / "model", policy)
    merged = Scorer.from_pretrained(folder / "model", dtype="fp32", token_budget=10**6)
    for found, again in zip(policy.judging.score_groups(ROWS), merged.score_groups(ROWS), strict=True):
        for (score,), (other,), q in zip(found.scores, again.scores, found.group.flat, strict=True):
            wanted = 0.22 * (logprobs(policy.model, q).sum() - logprobs(base.model, q).sum()).item()
            assert score == pytest.approx(wanted, rel=1e-4, abs=1e-5) == other
            assert abs(score) > 1e-3


def test_sft_scores_are_log_probs_summed_and_a_token(folder: Path) -> None:
    """The longer response has the lower log-prob, but the higher log-prob per token. The report has both accuracies."""
    policy = FakePolicy(tiny_config(folder, method="sft"))
    rows = [Preference(ASKED, ("7 7 7 7 7 7", "7"), source=f"x:{i}") for i in range(3)]
    groups = policy.judging.score_groups(rows)
    sums = torch.stack([logprobs(policy.model, q).sum() for q in groups[0].group.flat])
    means = torch.stack([logprobs(policy.model, q).mean() for q in groups[0].group.flat])
    assert [score for (score,) in groups[0].scores] == pytest.approx(sums.tolist(), rel=1e-4)
    assert groups[0].token_scores == pytest.approx(means.tolist(), rel=1e-4)
    report = source_reports(groups, 0)[""]
    assert report.accuracy == (sums[0] > sums[1]).item()
    assert report.token_accuracy == (means[0] > means[1]).item() != report.accuracy
    assert report.margin == pytest.approx((sums[0] - sums[1]).item(), rel=1e-4)
    assert "accuracy of log-probs a token 1.000" in str(report)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_policies_learn(folder: Path, name: str) -> None:
    """On the embedded task's pairs, the loss falls, and the held-out reward accuracy rises beyond its interval."""
    data = {"train": 512, "test": 128}
    for seed, (split, count) in enumerate(data.items()):
        claims = draw_claims(prompts(split), count, 0.7, np.random.default_rng(seed))
        write_pairs(folder / f"{split}.jsonl", *claims)
    rows, held_out = (read_preferences(folder / f"{split}.jsonl").rows for split in data)
    sizes = {"rollout_batch_size": 64, "minibatch_size": 64, "max_steps": 30, "token_budget": 4096}
    config = tiny_config(folder, method=name, learning_rate=1e-2, **sizes)
    result = run(folder / "run", config, rows, held_out)
    before, after = result["report_before"], result["report_after"]
    assert after["low"] > before["high"] and after["margin"] > before["margin"] + 1
    losses = [row["loss"] for row in read_metrics(folder / "run/metrics.jsonl")]
    assert losses[-1] < losses[0] / 2


RANKED = [
    {"prompt": "3 5", "responses": ["2", "7", "9", "1", "4"], "ranks": [3, 1, 2, 4, 4]},
    {"prompt": "3 0", "responses": ["2", "7", "9", "1"], "ranks": [1, 2, 1, 3]},
    {"prompt": "3 4", "responses": ["2", "7", "9"], "ranks": [2, 1, 2]},
    {"prompt": "3 6", "responses": ["2", "7"], "scores": [1, 5]},
]
SCORED = [
    *({"prompt": "3 5", "completion": text, "score": score} for text, score in (("2", 1), ("7", 5), ("9", 3))),
    *(
        {"prompt": "3 0", "completion": text, "score": score}
        for text, score in (("2", 4), ("7", 4), ("9", 1), ("2", 4))
    ),
    {"prompt": "3 1", "completion": "7", "score": 1},
]


@pytest.mark.parametrize("template", [None, "pairwise"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ties", ["drop", "keep"])
@pytest.mark.parametrize("rankings", ["pairs", "plackett_luce"])
@pytest.mark.parametrize(
    ("rows", "best"),
    [(RANKED, [["7"], ["2"], ["9"], ["7"], ["7"]]), (SCORED, [["7"], ["2"], ["7"]])],
    ids=["RANKING", "SINGLE"],
)
def test_sft_imitates_each_best_response_once(
    folder: Path, rows: list[dict[str, Any]], best: list[list[str]], rankings: str, ties: str, streaming: bool,
    template: str | None,
) -> None:  # fmt: skip
    path = str(write(folder / "ranked.jsonl", *rows))
    some = {"max_steps": 1} if streaming else {"max_steps": -1, "num_train_epochs": 1}
    options = {"rankings": rankings, "ties": ties, "streaming": streaming, "template": template, **some}
    if template is not None:  # of the words that the tiny tokenizer has
        asks = f"{PAIRWISE.evaluate} {{aspect}} <answer>[[A]]</answer> <answer>[[B]]</answer>"
        options["template"] = str(folder / "pairwise.yaml")
        (folder / "pairwise.yaml").write_text(yaml.safe_dump({"kind": template, "evaluate": asks}))
    config = tiny_config(folder, method="sft", dataset_name=path, minibatch_size=2, rollout_batch_size=6, **options)
    dialog = load_dialog(config)
    feed, _ = open_feed(config, dialog, Display())
    drawn = feed.next()
    assert streaming or len(drawn) == feed.total == len(best)
    trained = METHODS["sft"](config, dialog).groups(drawn[: len(best)], 0)
    texts = [[dialog.tokenizer.decode(q.ids[q.thought][:-1]) for q in group.flat] for group in trained]
    assert sorted(texts) == sorted(best)


def test_what_sft_leaves_out_is_said(tmp_path: Path) -> None:
    ranked = read_preferences(write(tmp_path / "ranked.jsonl", *RANKED), best_only=True)
    assert ranked.summary.endswith(
        "4 rows read, 4 used, 0 dropped; 5 groups from the 4 used rows; "
        "9 x responses left out: not the best of their row, or its repetition"
    )
    scored = read_preferences(write(tmp_path / "scored.jsonl", *SCORED), best_only=True)
    assert scored.used == 3 and sum(map(len, scored.dropped.values())) == 5
    assert scored.dropped == {
        "not the best response of its prompt, or its repetition": [1, 3, 6, 7],
        "the only completion of its prompt": [8],
    }
    tied = [{"prompt": "3 5", "responses": ["7", "9"], "ranks": [1, 1]}] * 2
    with pytest.raises(DataError, match="all responses tie"):
        read_preferences(write(tmp_path / "tied.jsonl", *tied), best_only=True)
    kept = read_preferences(tmp_path / "tied.jsonl", ties="keep", best_only=True)
    assert [row.responses for row in kept.rows] == [("7",), ("9",)] * 2 and not kept.notes


@pytest.mark.parametrize("streaming", [False, True])
def test_a_long_response_leaves_the_one_that_ties_with_it(folder: Path, streaming: bool) -> None:
    """In both formats each best response is a group of its own."""
    texts = ["7", " ".join(["9"] * 60), "2"]
    ranked = [{"prompt": "3 5", "responses": texts, "scores": [5, 5, 1]}]
    scored = [
        {"prompt": "3 5", "completion": text, "score": score} for text, score in zip(texts, (5, 5, 1), strict=True)
    ]
    for rows in (ranked, scored):
        path = str(write(folder / "rows.jsonl", *rows))
        config = tiny_config(folder, method="sft", dataset_name=path, max_length=40, streaming=streaming, max_steps=1)
        feed, _ = open_feed(config, load_dialog(config), Display())
        assert {row.responses for row in feed.next()} == {("7",)}


def test_held_out_rankings_of_sft_are_whole(folder: Path) -> None:
    path = str(write(folder / "ranked.jsonl", *RANKED))
    config = tiny_config(folder, method="sft", rankings="plackett_luce")
    rows, _ = read_rows((Part(path),), config, load_dialog(config), Display())
    assert [len(row.responses) for row in rows] == [5, 4, 2, 2, 2]
