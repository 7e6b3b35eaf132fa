"""A run that resumes after any update, is asked to stop, is resumed with different content, or has bad batches."""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import TIMED, make_trainer, weights
from tiny import tiny_config, tiny_folder, tiny_pairs
from torch import Tensor

from dwrl_fast import train
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Demonstration, Preference
from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode import Group, Thought, group_of, group_record
from dwrl_fast.errors import CheckpointError, ConfigError, NotFiniteError, Stopped
from dwrl_fast.progress import Display
from dwrl_fast.training.checkpoint import checkpoints, place_of
from dwrl_fast.training.manifest import fingerprint
from dwrl_fast.training.policy import Policy
from dwrl_fast.training.runlog import read_metrics
from dwrl_fast.training.trainer import Trainer


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in read_metrics(run / "metrics.jsonl")]


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())


def within(config: TrainConfig, run: Path) -> list[Path]:
    """The checkpoints within steps of an uninterrupted run."""
    make_trainer(dataclasses.replace(config, save_updates=1), run).train()
    return [path for path in checkpoints(run) if place_of(path)[1]]  # type: ignore[index]


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the state in a checkpoint, which stays intact."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = fingerprint(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


# After any update


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alternate": "rollout", "optimizer_state": "per_phase"},
        {"alternate": "joint", "old_logprobs": "recompute"},
        {"method": "grpo-point", "num_generations": 2},
        {"method": "bt"},
        {"method": "dpo"},
    ],
    ids=str,
)
def test_a_run_goes_on_to_the_bit_after_any_update(folder: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(folder, save_steps=1, max_steps=3, **changes)
    unsaved = dataclasses.replace(config, save_steps=0)
    make_trainer(unsaved, folder / "plain").train()
    found = within(config, folder / "whole")
    phases = len(make_trainer(config, folder / "none").method.phases)
    assert len(found) == 3 * (2 * phases - 1)
    assert untimed(folder / "whole") == untimed(folder / "plain") and same_weights(folder / "whole", folder / "plain")
    for path in found:
        run = folder / f"from-{path.name}"
        make_trainer(dataclasses.replace(config, resume_from_checkpoint=str(path)), run).train()
        assert same_weights(run, folder / "plain"), path.name
        place = place_of(path)
        assert place is not None
        assert untimed(run) == untimed(folder / "plain")[place[0] :], path.name
        for file in (run / "thoughts").glob("*.jsonl"):
            assert file.read_bytes() == (folder / "plain" / "thoughts" / file.name).read_bytes()


def test_what_is_compared_would_show_a_lost_thought(folder: Path) -> None:
    """The control: if the log-probs of the batch in a checkpoint change a little, the run is different."""
    config = tiny_config(folder, save_steps=0, max_steps=1, save_updates=1, alternate="joint")
    (path,) = within(config, folder / "whole")

    def change(state: dict[str, Any]) -> None:
        for thought in (one for group in state["current"]["groups"] for some in group["thoughts"] for one in some):
            thought["logprobs"] = [logprob - 1e-3 for logprob in thought["logprobs"]]

    rewrite(path, change)
    resumed = dataclasses.replace(config, resume_from_checkpoint=str(path))
    make_trainer(resumed, folder / "run").train()
    assert not same_weights(folder / "run", folder / "whole")


def test_groups_come_back_from_json_as_they_were() -> None:
    rows: list[Preference] = [
        Preference(({"role": "user", "content": "ä\u2028"},), ("a", "b"), 0.1, (1, 1), "x", "f:1", "s", "i", "f:1"),
        Demonstration(({"role": "user", "content": "q"},), ("a",), thought="t", verdict="Yes"),
    ]
    sequence = TokenSequence([1, 2, 3, 4], slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4))
    thought = Thought([3], [-1 / 3], ended=False, reward=0.5, score=None)
    for row in rows:
        for group in (
            Group(row, [[sequence], [sequence, sequence]], [[thought], [thought] * 2]),
            Group(row, [[sequence]], labels=[1]),
        ):
            text = json.dumps(group_record(group))
            back = group_of(json.loads(text))
            assert type(back.preference) is type(row) and back.preference == row
            assert (back.sequences, back.thoughts, back.labels) == (group.sequences, group.thoughts, group.labels)
            assert json.dumps(group_record(back)) == text


def test_a_log_prob_that_is_not_finite_is_saved() -> None:
    """Such a batch may be skipped, and a checkpoint within its step must not fail."""
    row = Preference(({"role": "user", "content": "q"},), ("a", "b"))
    thought = Thought([3, 4, 5], [-0.5, -math.inf, math.nan], ended=True)
    text = json.dumps(group_record(Group(row, [], [[thought]])), allow_nan=False)
    ((back,),) = group_of(json.loads(text)).thoughts
    assert back.ids == thought.ids and back.logprobs[0] == -0.5 and all(map(math.isnan, back.logprobs[1:]))


# Stopped by a signal


@contextmanager
def struck(place: int, strike: Callable[[], object], name: str = "update") -> Iterator[None]:
    """Call `strike` before the `place`-th call of a method of the trainer."""
    method, calls = getattr(Trainer, name), 0

    def watched(self: Trainer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == place:
            strike()
        return method(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, name, watched)
        yield


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("name", "place", "left"), [("_roll_out", 2, "1-1"), ("update", 6, "1-2"), ("update", 8, "2-0")]
)
def test_a_signal_saves_and_ends_the_run(
    folder: Path, caplog: pytest.LogCaptureFixture, number: int, status: int, name: str, place: int, left: str
) -> None:
    config = tiny_config(folder, save_steps=0, max_steps=3)
    make_trainer(config, folder / "plain").train()
    before = signal.getsignal(number)
    with struck(place, send(number), name), pytest.raises(Stopped) as stopped:
        make_trainer(config, folder / "run").train()
    assert stopped.value.status == status and stopped.value.saved and signal.getsignal(number) == before
    assert [place_of(path) for path in checkpoints(folder / "run")] == [tuple(map(int, left.split("-")))]
    assert (
        f"{signal.Signals(number).name}: the run saves a checkpoint" in caplog.text
        and "Saved and stopped" in caplog.text
    )
    make_trainer(dataclasses.replace(config, resume_from_checkpoint="latest", output_dir="run"), folder / "run").train()
    assert same_weights(folder / "run", folder / "plain") and untimed(folder / "run") == untimed(folder / "plain")


def test_a_second_signal_ends_the_run_at_once(folder: Path) -> None:
    def twice() -> None:
        for _ in "ab":
            os.kill(os.getpid(), signal.SIGTERM)

    with struck(2, twice), pytest.raises(Stopped) as stopped:
        make_trainer(tiny_config(folder), folder / "run").train()
    assert not stopped.value.saved and not checkpoints(folder / "run")


def test_a_signal_while_the_last_step_is_saved_ends_the_run_too(folder: Path) -> None:
    with struck(4, send(signal.SIGTERM), "save"), pytest.raises(Stopped) as stopped:
        make_trainer(tiny_config(folder, save_steps=1), folder / "run").train()
    assert stopped.value.saved and [place_of(path) for path in checkpoints(folder / "run")][-1] == (4, 0)
    assert not (folder / "run" / "model").exists()


# Resumed with other content


def other_rows(folder: Path) -> dict[str, Any]:
    tiny_pairs(folder / "pairs.jsonl", seed=5)
    return {}


def other_template(folder: Path) -> dict[str, Any]:
    (folder / "mine.yaml").write_text('evaluate: "check {aspect}"\nrate: "rate"\nlabels: ["Yes", "No"]\n')
    return {"template": str(folder / "mine.yaml")}


def other_tokenizer(folder: Path) -> dict[str, Any]:
    path = folder / "tiny" / "tokenizer.json"
    text = path.read_text()
    a, b = '"8": ', '"9": '
    assert a in text and b in text
    rules = json.loads(text)
    vocabulary = rules["model"]["vocab"]
    vocabulary["8"], vocabulary["9"] = vocabulary["9"], vocabulary["8"]
    path.write_text(json.dumps(rules))
    return {}


def other_chat_template(folder: Path) -> dict[str, Any]:
    for path in (folder / "tiny").iterdir():
        if path.name in ("chat_template.jinja", "tokenizer_config.json"):
            text = path.read_text()
            if "chat_template" in text and path.suffix == ".json":
                config = json.loads(text)
                path.write_text(json.dumps(config | {"chat_template": config["chat_template"] + "{# other #}"}))
            elif path.suffix == ".jinja":
                path.write_text(text + "{# other #}")
    return {}


def other_model(folder: Path) -> dict[str, Any]:
    tiny_folder(folder / "tiny", seed=1)
    return {}


OTHERS: dict[str, tuple[Callable[[Path], dict[str, Any]], str, str]] = {
    "rows": (other_rows, "the data set: its rows", "rows may be used twice or never"),
    "template": (other_template, "the template is different .*check", "a different question"),
    "tokenizer": (other_tokenizer, "the tokenizer is different", "a token id may mean a different text"),
    "chat template": (other_chat_template, "the chat template of the tokenizer is different", "saw different turns"),
    "model": (
        other_model,
        r"the base model .the weights that the run began with. is different",
        "adapters and a frozen",
    ),
    "steps": (lambda _: {"max_steps": 3}, "the number of steps was 2, is 3", "the learning rate falls"),
    "options": (lambda _: {"epsilon": 0.3}, "epsilon was 0.2, is 0.3", "the result no longer equals"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_another_is_refused_by_its_name_and_can_be_passed_over(
    folder: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    change, named, given_up = OTHERS[what]
    config = tiny_config(folder, save_steps=1, max_steps=2)
    make_trainer(config, folder / "run").train()
    path = folder / "run" / "checkpoint-000001"
    again = dataclasses.replace(config, resume_from_checkpoint=str(path))
    make_trainer(again, folder / "same")  # unchanged content is accepted
    again = dataclasses.replace(again, **change(folder))
    with pytest.raises(CheckpointError, match=named) as refused:
        make_trainer(again, folder / "other")
    assert "--resume_anyway" in str(refused.value)
    trainer = make_trainer(dataclasses.replace(again, resume_anyway=True), folder / "other")
    assert given_up in caplog.text and trainer.step == 1
    trainer.train()


# Resumed with other held-out rows


def held(folder: Path, name: str, count: int = 5, seed: int = 7) -> Path:
    return tiny_pairs(folder / f"{name}.jsonl", count, seed)


@pytest.mark.parametrize("within", [False, True])
def test_before_is_never_an_evaluation_of_trained_weights(
    folder: Path, caplog: pytest.LogCaptureFixture, within: bool
) -> None:
    config = tiny_config(folder, save_steps=1, save_updates=1, max_steps=2)
    make_trainer(config, folder / "run").train()
    path = folder / "run" / ("checkpoint-000000-0001" if within else "checkpoint-000001")
    again = dataclasses.replace(config, resume_from_checkpoint=str(path))
    trainer = make_trainer(again, folder / "other", held(folder, "a"))
    assert f"The held-out rows or --eval_votes differ from those of {path}" in caplog.text
    result = trainer.train()
    assert "accuracy_after" in result and not any("before" in name for name in result)
    caplog.clear()
    path = checkpoints(folder / "other")[-1]
    trainer = make_trainer(
        dataclasses.replace(config, resume_from_checkpoint=str(path)), folder / "last", held(folder, "a")
    )
    assert not any("before" in name for name in trainer.train()) and "held-out" not in caplog.text


@pytest.mark.parametrize("change", ["same rows elsewhere", "other rows", "no rows", "votes"])
def test_before_and_best_are_of_the_same_held_out_rows(
    folder: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    config = tiny_config(folder, save_steps=1, eval_steps=1, max_steps=3, eval_votes=2)
    whole = make_trainer(config, folder / "run", held(folder, "a")).train()
    path = folder / "run" / "checkpoint-000002"
    again = dataclasses.replace(config, resume_from_checkpoint=str(path))
    if change == "votes":
        again = dataclasses.replace(again, eval_votes=3)
    other = {"other rows": held(folder, "b", 4, 8), "no rows": None}.get(change, held(folder, "moved"))
    trainer = make_trainer(again, folder / "other", other)
    same = change == "same rows elsewhere"
    assert (trainer.best is not None) == same == ("held-out rows" not in caplog.text)
    result = trainer.train()
    shown = {name: result[name] for name in result if name.startswith(("accuracy", "report"))}
    if same:
        assert shown == {name: whole[name] for name in whole if name.startswith(("accuracy", "report"))}
    else:
        assert not any("before" in name for name in shown) and ("accuracy_after" in shown) == (change != "no rows")


def test_a_checkpoint_of_an_older_version_keeps_its_evaluations(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(folder, save_steps=1, eval_steps=1, max_steps=2)
    trainer = make_trainer(config, folder / "run", held(folder, "a"))
    trainer.train()
    path = folder / "run" / "checkpoint-000001"
    rewrite(path, lambda state: state.pop("evaluated"))
    again = dataclasses.replace(config, resume_from_checkpoint=str(path))
    resumed = make_trainer(again, folder / "other", held(folder, "a"))
    assert resumed.before == trainer.before != {} and resumed.best is not None and "held-out" not in caplog.text
    rewrite(path, lambda state: state.update(before={}))
    assert make_trainer(again, folder / "none", held(folder, "a")).best is None and "held-out" in caplog.text


def test_a_checkpoint_of_an_older_version_has_the_defaults_of_newer_options(folder: Path) -> None:
    config = tiny_config(folder, method="bt", save_steps=1, max_steps=2)
    make_trainer(config, folder / "run").train()
    path = folder / "run" / "checkpoint-000001"
    rewrite(path, lambda state: [state["identity"].pop(name) for name in ("adam_beta2", "lora_target_modules", "base")])
    again = dataclasses.replace(config, resume_from_checkpoint=str(path))
    assert make_trainer(again, folder / "other").step == 1
    with pytest.raises(CheckpointError, match=r"another run: adam_beta2 was 0\.999, is 0\.9\."):
        make_trainer(dataclasses.replace(again, adam_beta2=0.9), folder / "other")


# Bad batches


def poisoned(folder: Path, after: int, **changes: Any) -> Trainer:
    """A run of 3 steps in which the loss of the `after`-th update is NaN."""
    trainer = make_trainer(tiny_config(folder, save_steps=1, max_steps=3, **changes), folder / "run")
    loss, calls = trainer.method.loss, 0

    def bad(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(*arguments) * (torch.nan if calls == after else 1)

    trainer.method.loss = bad  # type: ignore[method-assign]
    return trainer


def test_a_bad_batch_is_written_and_ends_the_run(folder: Path) -> None:
    trainer = poisoned(folder, 6)
    with pytest.raises(
        NotFiniteError, match=r"step 2, minibatch 1, phase thought: losses .nan.*It is in .*json.*--skip_bad"
    ):
        trainer.train()
    (file,) = (folder / "run" / "bad_batches").iterdir()
    held = json.loads(file.read_text())
    assert held["phase"] == "thought" and len(held["groups"]) == 2 and "losses [nan]" in held["error"]
    groups = [group_of(record) for record in held["groups"]]
    assert all(group.thoughts for group in groups)
    assert checkpoints(folder / "run")[-1].name == "checkpoint-000001", "what was being written is waited for"


def test_a_bad_batch_is_skipped_as_if_it_were_not_there(folder: Path) -> None:
    trainer = poisoned(folder, 6, skip_bad_batches=1)
    steps, step = list[str](), trainer.policy.optimizers.step

    def counted(phase: str, *rest: Any) -> None:
        steps.append(phase)
        step(phase, *rest)

    trainer.policy.optimizers.step = counted  # type: ignore[method-assign, assignment]
    trainer.train()
    assert len(steps) == 3 * 4 - 1
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    assert [row.get("skipped_batches") for row in rows] == [None, 1, 1]
    assert all(row["thought_loss"] is not None and row["ratio"] is not None for row in rows), "none of it is counted"
    again = poisoned(folder, 6, skip_bad_batches=1, resume_from_checkpoint=f"{folder}/run/checkpoint-000003")
    assert again.skipped == 1


def test_a_bad_rollout_is_skipped_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny_config(folder, max_steps=3, skip_bad_batches=1), folder / "run")
    rollout, calls = trainer.rollout, 0

    def bad(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise NotFiniteError("log-probs are not finite")
        return rollout(*arguments)

    monkeypatch.setattr(trainer, "rollout", bad)
    assert trainer.train()["steps"] == 3
    (file,) = (folder / "run" / "bad_batches").iterdir()
    assert file.name == "step-000002-rollout.json" and len(json.loads(file.read_text())["rows"]) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_old_log_prob_that_is_not_finite_stops_before_the_step(folder: Path, value: float) -> None:
    trainer = make_trainer(tiny_config(folder), folder / "run")
    groups = trainer.rollout(trainer.feed.next(), 0, Display())[0]
    thoughts = [
        [dataclasses.replace(one, logprobs=[value] * len(one.ids)) for one in some] for some in groups[1].thoughts
    ]
    groups[1] = dataclasses.replace(groups[1], thoughts=thoughts)
    before = {name: p.clone() for name, p in trainer.policy.state().items()}
    for phase in ("score", "thought"):
        with pytest.raises(NotFiniteError, match="log-probs of the sampler or of the frozen model are not finite"):
            trainer.update(phase, trainer.policy.pack(groups, 4)[0], 0)
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.state().items())
    assert all(p.grad is None for p in trainer.policy.model.parameters())


# Memory


def short_of_memory(policy: Policy, most: int) -> Callable[..., Tensor]:
    """A loss for which batches of more than `most` tokens are too large."""

    def loss(phase: str, model: Any, batch: Any, *rest: Any) -> Tensor:
        value = policy_loss(phase, model, batch, *rest)
        if batch.trunk_tokens > most:
            (value * 1.0).backward(retain_graph=True)  # a pass that fails at its end leaves gradients
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return value

    policy_loss = policy.method_loss  # type: ignore[attr-defined]
    return loss


def test_out_of_memory_halves_the_micro_batch_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trained(most: int, name: str) -> Trainer:
        config = tiny_config(folder, token_budget=10**6, max_steps=1, rollout_batch_size=4, minibatch_size=4)
        trainer = make_trainer(config, folder / name)
        trainer.policy.method_loss = trainer.method.loss  # type: ignore[attr-defined]
        trainer.method.loss = short_of_memory(trainer.policy, most)  # type: ignore[method-assign]
        trainer.train()
        return trainer

    trained(10**6, "roomy")
    (row,) = read_metrics(folder / "roomy" / "metrics.jsonl")
    assert "halved_batches" not in row
    whole = row["trunk_tokens"]
    halved = trained(whole * 2 // 3, "tight")
    assert halved.policy.halved == 2 and caplog.text.count("Out of memory in a micro-batch") == 2  # once per phase
    (again,) = read_metrics(folder / "tight" / "metrics.jsonl")
    assert again["halved_batches"] == 2 and again["loss"] == pytest.approx(row["loss"], rel=1e-5)
    for name, p in weights(folder / "tight").items():
        torch.testing.assert_close(p, weights(folder / "roomy")[name], rtol=1e-3, atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"out of memory in a micro-batch of \d+ tokens: give --token_budget \d+ or less"
    ):
        trained(10, "none")


def test_the_options_of_resuming_are_not_those_of_the_run(folder: Path) -> None:
    config = tiny_config(folder, output_dir=str(folder / "run"), save_steps=1, max_steps=2)
    from rich.console import Console

    train.run(config, Console(quiet=True))
    (folder / "run" / "result.json").unlink()
    again = dataclasses.replace(config, resume_from_checkpoint="latest", resume_anyway=True, save_updates=3)
    train.run(again, Console(quiet=True))
    saved = train.configure(["--config", str(folder / "run" / "config.yaml")])
    assert not saved.resume_anyway and saved.resume_from_checkpoint is None
