"""The star methods: the kept thoughts, the computation on them, and rounds with few or no thoughts."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import CUT, FakePolicy, FakeSampler
from judging import A, B, logprobs, make_policy, shake, taken_gradients
from tiny import tiny_folder

from dwrl_fast.batching.batch import Size
from dwrl_fast.data import Preference
from dwrl_fast.dialog.chat import user
from dwrl_fast.encode import Group, comparison_requests
from dwrl_fast.errors import ConfigError, TemplateError
from dwrl_fast.feed import Feed, Shuffled
from dwrl_fast.log import logger
from dwrl_fast.methods import StepMetrics
from dwrl_fast.methods.star_sft import StarImitation
from dwrl_fast.progress import Display, Stage
from dwrl_fast.training.rollout import sampled_groups
from dwrl_fast.training.runlog import StallWatch, read_metrics
from dwrl_fast.training.trainer import Trainer

STAR = ["star-sft", "star-dpo", "star-rationalizer"]
PROMPT = (user("3 1 4"),)
PAIR = Preference(PROMPT, ("7", "8"), source="rows:1")
TIE = Preference(PROMPT, ("7", "8"), ranks=(1, 1), source="rows:2")
RANKING = Preference(PROMPT, ("7", "8", "9"), ranks=(1, 2, 2), source="rows:3")
ROWS = [
    Preference((user(f"{i} {i // 2}"),), (str(i % 4), str(i % 4 + 1 + i % 3)), source=f"rows:{i}") for i in range(4, 10)
]
QUESTION = """\
kind: rationalizer
evaluate: "compare {verdict} {aspect} {prompt} A {response_a} B {response_b} ok <answer>[[{verdict}]]</answer>"
"""


class Watched(Display):
    """Checks that every stage is complete at its end."""

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0, most: float = math.inf) -> Iterator[Stage]:
        with super().stage(name, total, done, most) as stage:
            yield stage
            assert stage.done == total


def make(folder: Path, name: str, says: Callable[[str, int], str] | None = None, **changes: Any) -> FakePolicy:
    """The method with a sampler that writes the given texts. It still judges with its own sampler."""
    (folder / "question.yaml").write_text(QUESTION)
    options = {"num_generations": 4, "rationalizer_template": str(folder / "question.yaml")} | changes
    return make_policy(folder, name, says, **options)


def right(text: str) -> str:
    """The right verdict for a context. The better response is the smaller number."""
    words = text.split()
    return A if int(words[words.index("A", 3) + 1]) < int(words[words.index("B", 3) + 1]) else B


def wrong(text: str) -> str:
    return B if right(text) == A else A


def roll(policy: FakePolicy, rows: list[Preference], seed: int = 0) -> tuple[list[Group], dict[str, float]]:
    return policy.roll_out(rows, seed, Watched())


def texts(policy: FakePolicy, group: Group) -> list[list[str]]:
    decode = policy.dialog.tokenizer.decode
    return [[decode(sequence.ids[sequence.thought]) for sequence in each] for each in group.sequences]


@pytest.mark.parametrize("name", ["star-sft", "star-rationalizer"])
def test_thoughts_with_the_right_verdict_are_kept(folder: Path, name: str) -> None:
    says = [lambda text: f"1 {right(text)}", lambda text: f"2 {wrong(text)}", lambda _: "ok", lambda t: right(t) + CUT]
    policy = make(folder, name, lambda text, i: says[i](text))
    groups, logs = roll(policy, [PAIR, TIE, RANKING])
    assert [len(group.sequences) for group in groups] == [1, 2] and groups[0].preference is PAIR
    for group in groups:
        for kept, sequences in zip(texts(policy, group), group.sequences, strict=True):
            verdict = right(policy.dialog.tokenizer.decode(sequences[0].ids))
            assert kept == [f"1 {verdict} <|end|>", verdict] and len({len(s.ids) for s in sequences}) == 2
        assert [[thought.ended for thought in some] for some in group.thoughts] == [[True, False]] * len(
            group.sequences
        )
    assert logs["comparisons"] == logs["kept_comparisons"] == 3 and logs["tied_comparisons"] == 2
    assert (logs["kept_thoughts"], logs["dropped_thoughts"]) == (6, 6)
    assert (logs["right_thoughts"], logs["unparsable"], logs["truncation_rate"]) == (0.5, 0.25, 0.25)
    masked = make(folder, name, lambda text, i: says[i](text), truncated_thoughts="mask")
    assert [len(kept) for group in roll(masked, [PAIR, RANKING])[0] for kept in texts(masked, group)] == [1, 1, 1]


@pytest.mark.parametrize("name", STAR)
def test_comparisons_that_teach_nothing_are_left_out(folder: Path, name: str) -> None:
    groups, logs = roll(make(folder, name, lambda text, i: wrong(text)), [PAIR, RANKING])
    assert groups == [] and logs["kept_comparisons"] == 0 and logs["comparisons"] == 3
    groups, logs = roll(make(folder, name), [TIE])
    assert groups == [] and logs["comparisons"] == 0 and logs["tied_comparisons"] == 1

    def about(text: str, i: int) -> str:  # of the ranking's comparisons, only the one with 9 gets a right verdict
        return right(text) if "9" in text and i else wrong(text)

    policy = make(folder, name, about)
    groups, logs = roll(policy, [PAIR, RANKING])
    (group,) = groups
    assert group.preference is RANKING and len(group.sequences) == 1 and logs["kept_comparisons"] == 1
    assert "9" in policy.dialog.tokenizer.decode(group.flat[0].ids)


@pytest.mark.parametrize("name", ["star-sft", "star-rationalizer"])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_imitation_is_the_mean_over_all_tokens(folder: Path, name: str, budget: int) -> None:
    """The thoughts differ in length and number. The temperature of sampling has no effect on the loss."""
    policy = make(
        folder, name, lambda text, i: "3 " * i + (right(text) if "7" in text or i else wrong(text)), temperature=0.7
    )
    groups, _ = roll(policy, [PAIR, RANKING, *ROWS[:2]])
    loss, gradients, metrics = policy.step(groups, budget=budget)
    tokens = torch.cat([logprobs(policy.model, sequence) for group in groups for sequence in group.flat])
    (-tokens.mean()).backward()
    assert loss == pytest.approx(-tokens.mean().item(), rel=1e-5) == metrics.means()["loss"]
    torch.testing.assert_close(gradients, taken_gradients(policy.model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize("beta", [None, 0.7])
def test_contrast_is_dpo_against_the_model_that_sampled(folder: Path, beta: float | None, budget: int) -> None:
    policy = make(
        folder, "star-dpo", lambda t, i: "3 " * i + (right(t) if i % 2 else wrong(t)), beta=beta, temperature=0.7
    )
    model = policy.model
    groups, logs = roll(policy, [PAIR, RANKING, *ROWS[:2]])
    assert logs["kept_thoughts"] == 2 * logs["kept_comparisons"] == 2 * logs["comparisons"] == 10
    pairs = [pair for group in groups for pair in group.sequences]
    with torch.no_grad():
        reference = [[logprobs(model, sequence).sum() for sequence in pair] for pair in pairs]
    shake(model)
    loss, gradients, metrics = policy.step(groups, budget=budget)
    figures = metrics.means()
    losses = []
    for (good, bad), (good_before, bad_before) in zip(pairs, reference, strict=True):
        lead = logprobs(model, good).sum() - good_before - logprobs(model, bad).sum() + bad_before
        losses.append(torch.log1p((-(beta or 0.1) * lead).exp()))
    total = torch.stack(losses).mean()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5) == figures["loss"] and abs(loss - math.log(2)) > 1e-3
    torch.testing.assert_close(gradients, taken_gradients(model), rtol=1e-3, atol=1e-6)
    assert figures["reward_accuracy"] == sum(each.item() < math.log(2) for each in losses) / 5


def test_contrast_draws_one_of_each_kind(folder: Path) -> None:
    def says(text: str, i: int) -> str:
        return ["1 " + right(text), "2 " + right(text), "3 " + wrong(text), "ok"][i]

    policy = make(folder, "star-dpo", says)
    drawn = set()
    for seed in range(12):
        groups, logs = roll(policy, [PAIR], seed)
        ((good, bad),) = texts(policy, groups[0])
        assert right(policy.dialog.tokenizer.decode(groups[0].flat[0].ids)) in good and groups[0].rewards == [[1, 0]]
        drawn.add((good[0], bad[0]))
    assert drawn == {(good, bad) for good in "12" for bad in "3o"}, "one that cannot be read is wrong"
    assert texts(policy, roll(policy, [PAIR], 3)[0][0]) == texts(policy, roll(policy, [PAIR], 3)[0][0])
    assert (logs["only_right"], logs["only_wrong"]) == (0, 0)
    policy = make(folder, "star-dpo", lambda text, i: right(text) if "9" in text else wrong(text))
    groups, logs = roll(policy, [PAIR, RANKING])
    assert groups == [] and (logs["only_right"], logs["only_wrong"]) == (1, 2)


def test_rationales_are_told_the_verdict_and_learnt_without_it(folder: Path) -> None:
    told: list[str] = []

    def says(text: str, i: int) -> str:
        told.append(text.split()[2])
        return f"{i} {right(text)}"

    policy = make(folder, "star-rationalizer", says)
    rows = ROWS[:4]
    groups, _ = policy.rollout(rows)
    comparisons = [request.comparisons for request in policy.method.requests(rows, 0)]
    assert told[::4] == ["AB"[some[0].right or 0] for some in comparisons] and set(told) == {"A", "B"}
    for group, request in zip(groups, comparison_requests(rows, comparisons, policy.dialog), strict=True):
        for sequence in group.flat:
            assert sequence.ids[: sequence.thought.start] == request.contexts[0].ids
        assert not any(thought.logprobs for some in group.thoughts for thought in some) and len(group.flat) == 4


def test_another_models_rationales_go_by_their_text(folder: Path) -> None:
    tiny_folder(folder / "stronger", seed=1)
    policy = make(folder, "star-rationalizer", rationalizer_model=str(folder / "stronger"))
    lm = policy.roll_out.sampler.model.lm  # type: ignore[union-attr]
    assert lm is not policy.model.lm and not any(p.requires_grad for p in lm.parameters())
    policy.roll_out.sampler = FakeSampler(policy.method.question, lambda text, i: f"{i} {right(text)}" + CUT * (i == 3))
    groups, _ = policy.rollout([PAIR])
    verdict = right(policy.dialog.tokenizer.decode(groups[0].flat[0].ids))
    assert texts(policy, groups[0]) == [[f"{i} {verdict}" + " <|end|>" * (i < 3) for i in range(4)]]
    with pytest.raises(ConfigError, match="kind rationalizer"):
        make(folder, "star-rationalizer", rationalizer_template="pairwise")
    with pytest.raises(TemplateError, match="--template"):
        make(folder, "star-rationalizer", rationalizer_template="missing.yaml")


def make_trainer(policy: FakePolicy, folder: Path, rows: list[Preference]) -> Trainer:
    """A trainer with the rollout of `policy`. Its evaluation uses its own sampler."""
    config = policy.method.config
    folder.mkdir()
    feed = Feed([Shuffled("rows", rows, 0)], [1.0], batch_size=len(rows), epochs=1, max_steps=config.max_steps)
    trainer = Trainer(config, policy.method, policy.judging, feed, rows, folder, Display())
    trainer.rollout = policy.roll_out
    trainer.resume()
    return trainer


@pytest.mark.parametrize("name", STAR)
def test_rounds_that_keep_little_or_nothing(folder: Path, name: str) -> None:
    """The learning rate follows the drawn rows, and a resumed run equals the uninterrupted one."""
    rows = ROWS[:4]
    kept_at = {2: 3, 3: 1, 5: 4}  # by step, the number of rows of which something is kept

    def go(run: str, **changes: Any) -> list[dict[str, Any]]:
        heard: dict[int, list[str]] = defaultdict(list)  # by step

        def says(text: str, i: int) -> str:
            step = trainer.step + 1
            heard[step].extend([text] * (i == 0))
            return right(text) if len(heard[step]) <= kept_at.get(step, 0) and i % 2 else wrong(text)

        options = {"eval_votes": 0, "save_steps": 1, "minibatch_size": 2, "max_steps": 5} | changes
        trainer = make_trainer(make(folder, name, says, **options), folder / run, rows)
        result = trainer.train()
        assert result["steps"] == 5
        return read_metrics(folder / run / "metrics.jsonl")

    log = go("whole")
    assert [row["kept_comparisons"] for row in log] == [0, 3, 1, 0, 4]
    assert (
        ["loss" in row for row in log]
        == ["grad_norm_thought" in row for row in log]
        == [False, True, True, False, True]
    )
    # There are 2 minibatches per step. The last trained one of a step is the 4th, 5th and 10th of 10.
    rates = [row["learning_rate_thought"] for row in log if "loss" in row]
    assert rates == pytest.approx([1e-2 * (1 - done / 10) for done in (3, 4, 9)])
    thoughts = (folder / "whole" / "thoughts" / "step-000002.jsonl").read_text().splitlines()
    assert {"comparison", "thought", "reward"} <= set(json.loads(thoughts[0]))
    again = go("resumed", resume_from_checkpoint=str(folder / "whole" / "checkpoint-000002"))
    timed = ("seconds", "tokens_per_second", "share_")
    for theirs, ours in zip(log[2:], again, strict=True):
        assert all(ours[k] == v for k, v in theirs.items() if not k.startswith(timed))


def learn_the_form(policy: FakePolicy) -> None:
    method, model = policy.method, policy.model
    groups = sampled_groups(method, method.requests(ROWS, 0), policy.roll_out.sampler, 0)
    batches = policy.batches(groups)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(12):
        for batch in batches:
            StarImitation.loss(method, "thought", model, batch, Size.of(groups), StepMetrics()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", STAR)
def test_training_makes_greedy_verdicts_right(folder: Path, name: str) -> None:
    """Every other thought is right, and the model learns the right ones."""
    sizes = {"max_steps": 40, "rollout_batch_size": 6, "minibatch_size": 6}
    policy = make(folder, name, lambda text, i: [A, B][i % 2], eval_votes=0, **sizes)
    if name == "star-dpo":  # needs a model that knows the form, because the loss only compares thoughts
        learn_the_form(policy)
    result = make_trainer(policy, folder / "run", ROWS).train()
    assert result["accuracy_before"] < 0.6 and result["accuracy_after"] == 1
    first, *_, last = (row["loss"] for row in read_metrics(folder / "run" / "metrics.jsonl"))
    # With one update per round, the model that star-dpo trains is its own reference.
    assert first == last == pytest.approx(math.log(2)) if name == "star-dpo" else last < first


def test_rounds_without_a_right_thought_are_said(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    watch = StallWatch()
    for _ in range(6):
        watch.update({"comparisons": 4.0, "kept_comparisons": 0.0, "right_thoughts": 0.0, "unparsable": 1.0}, 4)
    assert [r.getMessage() for r in caplog.records if "has a thought to train on" in r.getMessage()]
