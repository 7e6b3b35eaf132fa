"""A run that trained nothing reports this at its end: in result.json, in its message, and by its exit status."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from judging import RUBRIC
from rich.console import Console
from tiny import tiny_config, tiny_dialog, tiny_model, tiny_rows

from dwrl_fast import train
from dwrl_fast.console import command
from dwrl_fast.embedded.arrays import EVALUATE, RATE
from dwrl_fast.embedded.tokenizer import IDS
from dwrl_fast.encode import Group, Thought, plain_groups
from dwrl_fast.models.pretrained import save_pretrained
from dwrl_fast.sampling import groups
from dwrl_fast.training.runlog import StallWatch, read_metrics

POINTS = "kind: pointwise\nevaluate: score {aspect} {prompt} {response} ok <s> 7 </s>\n"
LABELLED = "kind: direct\nevaluate: compare {aspect} {prompt} A {response_a} B {response_b}\nlabels: ['A', 'B']\n"
PAIRWISE = ["grpo-pair", "star-sft", "star-dpo", "star-rationalizer"]


@pytest.fixture
def folder(folder: Path) -> Path:
    """The folder, with templates of other kinds."""
    (folder / "pairwise.yaml").write_text(RUBRIC)
    (folder / "pointwise.yaml").write_text(POINTS)
    (folder / "rationalizer.yaml").write_text(
        'kind: rationalizer\nevaluate: "score {verdict} {aspect} {prompt} A {response_a} B {response_b} '
        'ok <answer>[[{verdict}]]</answer>"\n'
    )
    return folder


def options(folder: Path, method: str, run: str = "run", **more: Any) -> list[str]:
    given = {"method": method, "model_name_or_path": folder / "tiny", "dataset_name": folder / "pairs.jsonl"}
    given |= {"rollout_batch_size": 4, "minibatch_size": 2, "max_steps": 2, "num_generations": 3, "save_steps": 1}
    given |= {"max_completion_length": 1, "output_dir": folder / run}
    if method in (*PAIRWISE, "grpo-point"):
        given["template"] = folder / ("pointwise.yaml" if method == "grpo-point" else "pairwise.yaml")
    if method == "star-rationalizer":
        given["rationalizer_template"] = folder / "rationalizer.yaml"
    return [text for name, value in (given | more).items() for text in (f"--{name}", str(value))]


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thought has a verdict, a number or an end, whatever the random model writes."""
    closed = groups.closed_groups

    def unread(thought: Thought) -> Thought:
        return dataclasses.replace(thought, ids=[IDS["ok"]] * len(thought.ids), ended=False)

    def replaced(requests: Any, thoughts: Any, dialog: Any) -> list[Group]:
        return closed(requests, [[unread(thought) for thought in some] for some in thoughts], dialog)

    monkeypatch.setattr(groups, "closed_groups", replaced)


def outcome(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> int:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    try:
        command(train.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def result(folder: Path, run: str = "run") -> dict[str, Any]:
    return dict(json.loads((folder / run / "result.json").read_text()))


@pytest.mark.parametrize(
    ("method", "why"),
    [
        *((name, "has a thought to train on") for name in PAIRWISE[1:]),
        *((name, "are all right or all wrong") for name in ("grpo-pair", "grpo-point")),
    ],
)
def test_thoughts_that_nothing_can_be_learnt_from(
    folder: Path, nothing_said: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, method: str, why: str
) -> None:
    assert outcome(monkeypatch, options(folder, method)) == 3
    said = capsys.readouterr().err
    assert "training had no effect in any of the 2 rollout batches" in said and why in said
    found = result(folder)
    assert found["trained"] is False and why in found["why"] and found["why"] in said
    for row in read_metrics(folder / "run" / "metrics.jsonl"):
        assert not row.get("grad_norm_thought"), "the oracle: not one gradient"


@pytest.mark.parametrize("method", ["dwrl", "btpo", "bt", "gram"])
def test_a_run_that_trained_ends_as_ever(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    (folder / "direct.yaml").write_text(LABELLED)
    more: dict[str, Any] = {"template": folder / "direct.yaml"} if method == "gram" else {}
    assert outcome(monkeypatch, options(folder, method, max_completion_length=6, **more)) == 0
    assert result(folder)["trained"] is True and "why" not in result(folder)


def test_ties_alone_teach_no_verdict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    ties = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "ranks": [1, 1]} for row in rows]
    (folder / "ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ties))
    argv = options(folder, "grpo-pair", dataset_name=folder / "ties.jsonl", ties="keep")
    assert outcome(monkeypatch, argv) == 3
    assert "no row has a response that is better than another" in result(folder)["why"]
    assert outcome(monkeypatch, options(folder, "dwrl", "ties", dataset_name=folder / "ties.jsonl", ties="keep")) == 0


def mute_labels(folder: Path) -> None:
    """Save a model that gives Yes and No a tiny probability in the rate turn."""
    model, dialog = tiny_model(), tiny_dialog()
    with torch.no_grad():
        ids = [group.flat[0].ids for group in plain_groups(tiny_rows(folder), dialog)]
        ended = torch.stack([model.lm.model(torch.tensor([each])).last_hidden_state[0, -1] for each in ids]).mean(0)
        for label in (dialog.yes_id, dialog.no_id):
            model.lm.lm_head.weight[label] = -40 * ended / ended.square().sum()
    card = {"method": "dwrl", "score_normalization": "vocab", "temperature": 1.0, "max_completion_length": 6}
    save_pretrained(folder / "tiny", model, dialog, card)


@pytest.mark.parametrize("normalization", ["vocab", "yes_no"])
def test_labels_that_the_model_does_not_use(folder: Path, monkeypatch: pytest.MonkeyPatch, normalization: str) -> None:
    mute_labels(folder)
    more: dict[str, Any] = {"max_completion_length": 6, "learning_rate": 1e-6, "score_normalization": normalization}
    assert outcome(monkeypatch, options(folder, "dwrl", **more)) == 3
    assert all(row["label_mass"] < 1e-3 for row in read_metrics(folder / "run" / "metrics.jsonl"))
    assert "the labels together have" in result(folder)["why"] and "--template" in result(folder)["why"]
    template = {"evaluate": EVALUATE + " {aspect}", "rate": RATE, "labels": ["1", "2"]}
    (folder / "others.yaml").write_text(yaml.safe_dump(template))
    more |= {"template": folder / "others.yaml"}
    assert outcome(monkeypatch, options(folder, "dwrl", "others", **more)) == 0, "the remedy works"


def test_thoughts_that_are_all_cut_and_masked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is trained, but the thoughts are not, so half of the method has no effect."""
    assert outcome(monkeypatch, options(folder, "dwrl", truncated_thoughts="mask")) == 3
    assert "all thoughts are cut at the limit" in result(folder)["why"]
    log = read_metrics(folder / "run" / "metrics.jsonl")
    assert all(row["grad_norm_thought"] == 0 < row["grad_norm_score"] for row in log)
    assert outcome(monkeypatch, options(folder, "dwrl", "kept", truncated_thoughts="keep")) == 0
    more: dict[str, Any] = {"truncated_thoughts": "mask", "max_completion_length": 12}
    assert outcome(monkeypatch, options(folder, "dwrl", "longer", **more)) == 0


@pytest.mark.parametrize(("limit", "trained"), [(1, False), (12, True)])
def test_a_resumed_run_knows_what_the_first_part_trained(
    folder: Path, limit: int, trained: bool, request: pytest.FixtureRequest
) -> None:
    """The last checkpoint is after the last step, so the resumed run itself trains nothing."""
    if not trained:
        request.getfixturevalue("nothing_said")
    config = tiny_config(
        folder, truncated_thoughts="mask", max_completion_length=limit, max_steps=2, output_dir=str(folder / "run")
    )
    whole = train.run(config, Console(quiet=True))
    again = dataclasses.replace(
        config, output_dir=str(folder / "again"), resume_from_checkpoint=str(folder / "run" / "checkpoint-000002")
    )
    resumed = train.run(again, Console(quiet=True))
    assert whole["trained"] is resumed["trained"] is trained and whole.get("why") == resumed.get("why")


def test_a_finished_run_that_trained_nothing_keeps_its_status(
    folder: Path, nothing_said: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = options(folder, "grpo-pair")
    assert outcome(monkeypatch, argv) == outcome(monkeypatch, [*argv, "--resume_from_checkpoint", "latest"]) == 3


def test_judge_trains_nothing_by_design(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--method", "judge", "--model_name_or_path", f"{folder}/tiny", "--output_dir", f"{folder}/run"]
    argv += ["--eval_dataset_name", f"{folder}/pairs.jsonl", "--template", f"{folder}/pairwise.yaml"]
    argv += ["--max_completion_length", "6"]
    assert outcome(monkeypatch, argv) == 0 and "trained" not in result(folder)


def test_one_batch_that_trained_is_enough() -> None:
    watch = StallWatch()
    idle = {"loss": 0.5, "advantage": 0.0, "reward": 0.0, "unparsable": 1.0, "grad_norm_thought": 0.0}
    watch.update(idle, 4)
    assert not watch.result()["trained"]
    watch.update(idle | {"advantage": 0.5, "grad_norm_thought": 1.0}, 4)
    watch.update(idle, 4)
    assert watch.result() == {"trained": True}
    still = StallWatch()
    still.update({"loss": 0.0, "grad_norm_score": 0.0}, 4)
    assert "the gradient of the update score is 0" in still.result()["why"]
    skipped = StallWatch()
    skipped.update({"skipped_batches": 2}, 4)
    assert "every update was skipped" in skipped.result()["why"]
    skipped.update({"skipped_batches": 2, "grad_norm_score": 0.0}, 4)  # those of earlier rollout batches
    assert "no row has a response that is better" in skipped.result()["why"]
