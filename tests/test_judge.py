"""`judge`, which trains nothing, and votes; `btpo`, which is `dwrl` with fixed options."""

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import CUT, FakePolicy, FakeSampler
from judging import RUBRIC, A, B, make_policy
from rich.console import Console
from tiny import tiny_config, tiny_rows

from dwrl_fast import evaluate, train
from dwrl_fast.config import TrainConfig, parse_evaluate, parse_train
from dwrl_fast.dialog import load_template, read_choice
from dwrl_fast.errors import ConfigError
from dwrl_fast.evaluation.pairs import PairReport
from dwrl_fast.evaluation.sources import source_reports
from dwrl_fast.methods import METHODS
from dwrl_fast.scoring import ChoiceJudging


def test_it_is_evaluated_and_saved_and_nothing_is_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, pairs = folder / "run", f"{folder}/pairs.jsonl"
    (folder / "rubric.yaml").write_text(RUBRIC)
    argv = ["--method", "judge", "--model_name_or_path", f"{folder}/tiny", "--eval_dataset_name", pairs]
    train.main([*argv, "--template", f"{folder}/rubric.yaml", "--output_dir", str(run), "--max_completion_length", "6"])
    said = capsys.readouterr().out
    assert "judge trains nothing" in said and "Held-out pair accuracy, judge" in said and "after judge" not in said
    result = json.loads((run / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["steps"] == 0 and "accuracy_before_4_thoughts" in result and "accuracy_after" not in result
    card = json.loads((run / "model" / "preference_model.json").read_text())
    assert card["method"] == "judge" and card["dialog"]["template"]["evaluate"].startswith("score {aspect}")
    argv = ["--model_name_or_path", f"{run}/model", "--dataset_name", pairs, "--votes", "3"]
    report = evaluate.run(parse_evaluate(argv), Console(quiet=True))
    assert 0 < report.unparsable < 12 * 2 * 3, "of a drawn model's thoughts"
    again = PairReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert str(again) == str(report)


def test_the_documented_template_of_a_foreign_judge_can_be_used(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    block = text.split("# rubrics.yaml\n", 1)[1].split("\n```", 1)[0]
    (tmp_path / "rubrics.yaml").write_text(textwrap.dedent(block), encoding="utf-8")
    template = load_template(str(tmp_path / "rubrics.yaml"))
    assert (
        template.kind == "pairwise" and "<rubric>" in template.evaluate and template.evaluate.endswith("{response_b}")
    )
    assert read_choice("<rubric>\n1. It is right.\n</rubric>\n<eval>\nA is.\n</eval>\n\n<answer>[[A]]</answer>") == 0


def test_what_a_judge_needs_is_said() -> None:
    with pytest.raises(ConfigError, match=r"judge trains nothing.*--eval_dataset_name"):
        train.configure(["--method", "judge"])
    with pytest.raises(ConfigError, match="eval_dataset_name needs a model"):
        parse_train(["--method", "judge", "--eval_dataset_name", "pairs.jsonl"])


@pytest.mark.parametrize(
    ("says", "accuracy"),
    [
        ([A, A, B, A, B, B], 1.0),  # 2 of 3 for the better one in both orders
        ([B, B, A, B, A, A], 0.0),
        ([A, A, A, A, A, A], 0.5),  # always for the one that is shown first
        ([A, A, A, A, A, B], 1.0),  # 4 of 6 for the better one
        ([A, "ok", "ok", B, B, "ok"], 0.5),  # an unreadable verdict counts for the worse one
        (["score ok bad <answer>[[B]]</answer> no: " + A, A, A + CUT, B, B, B], 1.0),  # the last verdict counts
    ],
)
def test_votes_of_both_orders_count_together(folder: Path, says: list[str], accuracy: float) -> None:
    policy = make_policy(folder, "judge")
    row = tiny_rows(folder)[0]
    first = policy.dialog.tokenizer.decode(policy.dialog.context(row.prompt, row.responses).ids)
    sampler = FakeSampler(policy.dialog, lambda text, i: says[i if text == first else 3 + i])
    runtime = dataclasses.replace(policy.runtime, sampler=sampler)
    groups = ChoiceJudging(runtime, policy.method.card()).score_groups([row], votes=3)
    assert source_reports(groups, 0)[""].accuracy == accuracy
    assert groups[0].unparsable == says.count("ok")


def test_a_judge_has_nothing_to_train(folder: Path) -> None:
    method = make_policy(folder, "judge").method
    assert method.phases == () and not method.trains and [m.trains for m in METHODS.values()].count(False) == 1


def joint(folder: Path, name: str, **changes: Any) -> dict[str, torch.Tensor]:
    policy = FakePolicy(tiny_config(folder, method=name, **changes))
    groups, _ = policy.rollout(tiny_rows(folder)[:4])
    assert policy.method.phases == ("joint",)
    return policy.step(groups, "joint", policy.runtime.layout.token_budget)[1]


def test_btpo_is_dwrl_with_one_joint_update(folder: Path) -> None:
    ours = joint(folder, "btpo")
    theirs = joint(folder, "dwrl", alternate="joint", joint_reward="standardised")
    centred = joint(folder, "dwrl", alternate="joint", joint_reward="centred")
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())
    assert any(not torch.allclose(gradient, centred[name], rtol=1e-2) for name, gradient in ours.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--alternate", "minibatch"], "alternate = minibatch with method = btpo"),
        (["--alternate", "rollout"], "alternate = rollout with method = btpo"),
        (["--joint_reward", "centred"], "joint_reward = centred with method = btpo"),
        (["--score_learning_rate", "1e-6"], "score_learning_rate with alternate = joint"),
        (["--optimizer_state", "per_phase"], "optimizer_state = per_phase with alternate = joint"),
        (["--num_generations", "1"], "num_generations = 1"),
    ],
)
def test_what_contradicts_btpo_is_refused_by_name(options: list[str], said: str) -> None:
    own = ["--method", "btpo", "--model_name_or_path", "model", "--dataset_name", "pairs.jsonl"]
    with pytest.raises(ConfigError, match=said):
        parse_train([*own, *options])


def test_a_saved_btpo_is_btpo(tmp_path: Path) -> None:
    own = ["--method", "btpo", "--model_name_or_path", "model", "--dataset_name", "pairs.jsonl"]
    config = parse_train([*own, "--alternate", "joint"])
    assert config.alternate == "joint" and config == parse_train(own)
    config.save(tmp_path / "config.yaml")
    assert parse_train(["--config", str(tmp_path / "config.yaml")]) == config
    assert train.configure(["--method", "btpo"]).alternate == "joint"
    assert isinstance(config, TrainConfig)
