"""The model card that every run leaves beside its weights: what it says is what happened, and what it shows works."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from tiny import tiny_config, tiny_pairs

from dwrl_fast import Scorer, evaluate, train
from dwrl_fast.config import TrainConfig, parse_evaluate, parse_train
from dwrl_fast.data.mixture import Part
from dwrl_fast.training.card import HERE, model_card
from dwrl_fast.training.runlog import read_metrics

NASTY = "a|b`c <img src=x> [click](x) \u202e.jsonl"


@pytest.fixture(scope="module")
def trained(module_folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """A run, with held-out pairs in a file whose name would like to be markup."""
    tiny_pairs(module_folder / NASTY, 8, seed=3)
    config = tiny_config(
        module_folder,
        max_steps=1,
        eval_votes=0,
        eval_dataset_name=(Part(str(module_folder / NASTY)),),
        output_dir=str(module_folder / "run"),
    )
    return config, train.run(config, Console(quiet=True))


@pytest.fixture(scope="module")
def card(trained: tuple[TrainConfig, dict[str, Any]]) -> str:
    return (Path(str(trained[0].output_dir)) / "model" / "README.md").read_text(encoding="utf-8")


def front(card: str) -> dict[str, Any]:
    return dict(ModelCard(card).data.to_dict())


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", card, re.M | re.S)


def test_its_figures_are_those_of_the_run_and_of_an_evaluation(
    trained: tuple[TrainConfig, dict[str, Any]], card: str
) -> None:
    config, result = trained
    folder = Path(str(config.output_dir))
    (line,) = re.findall(r"^\| after \| (.*) \|$", card, re.M)
    after = result["report_after"]
    interval = f"{after['low']:.3f} to {after['high']:.3f}"
    error = after["calibration_error"]
    assert line.split(" | ") == [f"{after['accuracy']:.3f}", interval, "8", f"{after['nll']:.3f}", f"{error:.3f}"]
    rows = ["--dataset_name", str(config.eval_dataset_name[0].dataset_name), "--output_dir", f"{folder}/report"]
    evaluate.run(parse_evaluate(["--model_name_or_path", f"{folder}/model", *rows]), Console(quiet=True))
    report = json.loads((folder / "report" / "report.json").read_text())
    assert error == pytest.approx(report["calibration"]["error"], abs=1e-5)
    mass = read_metrics(folder / "metrics.jsonl")[-1]["label_mass"]
    assert f"the labels have {mass:.1%} of the probability" in card
    assert "fewer than 100 rows" in card and "| preference groups | 12 |" in card


def test_its_front_is_the_hubs(card: str) -> None:
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dwrl_fast", "preference-model", "dwrl"],
    }


def test_names_of_files_are_no_markup(card: str) -> None:
    (line,) = (line for line in card.splitlines() if line.startswith("How often the better response"))
    assert r"a\|b\`c \<img src=x\> \[click\](x) \\u202e.jsonl" in line
    assert "\u202e" not in card and str(Path.cwd()) not in card.replace(blocks(card, "bash")[0], "")


def test_its_command_is_the_runs(trained: tuple[TrainConfig, dict[str, Any]], card: str) -> None:
    (command,) = blocks(card, "bash")
    python, m, module, *argv = shlex.split(command.replace("\\u202e", "\u202e"))
    assert (python, m, module) == ("python", "-m", "dwrl_fast.train")
    assert parse_train(argv) == trained[0]
    assert len(argv) < 40, "only what is not the default"


def test_its_examples_work(trained: tuple[TrainConfig, dict[str, Any]], card: str) -> None:
    folder = f"{trained[0].output_dir}/model"
    judge: dict[str, Any] = {}
    plainly: dict[str, Any] = {}
    for code, names in zip(blocks(card, "python"), (judge, plainly), strict=True):
        exec(code.replace(HERE, folder), names)
    assert torch.equal(judge["scores"], Scorer.from_pretrained(folder).score(["Name a prime."], ["7"]))
    assert plainly["model"].config.model_type == "llama" and plainly["tokenizer"].chat_template


def test_what_is_known_of_base_model_license_and_data_is_said(
    trained: tuple[TrainConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config, result = trained
    shutil.copytree(str(config.model_name_or_path), tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n# x\n")
    parts = (Part("c/d:train", 0.5), Part(str(config.dataset_name), 0.5))
    known = dataclasses.replace(
        config, model_name_or_path=str(tmp_path / "base"), dataset_name=None, dataset_mixture=parts
    )
    found = front(model_card(known, result, []))
    assert [found[name] for name in ("license", "base_model", "datasets")] == ["mit", "a/b", ["c/d"]]
    named = dataclasses.replace(config, model_name_or_path="Qwen/Qwen2.5-3B-Instruct")
    text = model_card(named, result, [], repository="me/mine", processes=8)
    assert front(text)["base_model"] == "Qwen/Qwen2.5-3B-Instruct"
    rates = dataclasses.replace(config, score_learning_rate=1e-5, thought_learning_rate=1e-4)
    assert "| learning rate | 1e-05 (score), 0.0001 (thought), linear |" in model_card(rates, result, [])
    assert "# mine\n" in text and "torchrun --nproc-per-node 8 -m dwrl_fast.train" in text
    (command,) = blocks(text, "bash")
    assert str(Path(str(config.output_dir)).parent) not in text, "folders of this machine"
    assert "--model_name_or_path Qwen/Qwen2.5-3B-Instruct" in command and "--output_dir run" in command


def test_an_uploaded_command_has_no_folders_and_keeps_the_rest(trained: tuple[TrainConfig, dict[str, Any]]) -> None:
    parts = (Part("/lake/customer=acme/day=1/a.parquet,~ann/b.parquet", 0.5), Part("c/d:train", 0.5))
    held = (Part("/home/ann/held.jsonl", aspect="helpful and/or safe"), Part("file:///home/ann/more.jsonl"))
    config = dataclasses.replace(
        trained[0], dataset_name=None, dataset_mixture=parts, eval_dataset_name=held, template="/home/ann/t.yaml/"
    )
    (command,) = blocks(model_card(config, trained[1], [], repository="me/mine"), "bash")
    words = shlex.split(command)
    shown = ["a.parquet,b.parquet:0.5", "c/d:train:0.5", "held.jsonl::helpful and/or safe", "more.jsonl", "t.yaml"]
    assert set(shown) <= set(words) and "ann" not in command and "acme" not in command


@pytest.mark.parametrize("method", ["bt", "gram", "grpo-pair", "grpo-point", "dpo", "sft", "star-sft", "judge"])
def test_every_kind_of_method_has_a_card(trained: tuple[TrainConfig, dict[str, Any]], method: str) -> None:
    config, result = trained
    card = model_card(dataclasses.replace(config, method=method), result | {"trained": False, "why": "none"}, [])
    assert f"`--method {method}`" in card and front(card)["tags"][-1] == method
    assert ("frozen reference" in card) == (method == "dpo") and "Training did not work: none." in card
    auto = "AutoModelForSequenceClassification" if method == "bt" else "AutoModelForCausalLM"
    assert f"model = {auto}.from_pretrained(" in card
    assert ("reference=others)\nbetter" in card) == (method not in ("bt", "grpo-point", "dpo", "sft"))


def test_options_go_to_a_command_line_and_back() -> None:
    options = ["--columns", "chosen=a b", "--columns", "rejected=c", "--eval_dataset_name", "x.jsonl::tone", "y.jsonl"]
    options += ["--dataset_mixture", "c/d:train:0.7", "e.jsonl:0.3:aspect", "--model_name_or_path", "m", "--use_peft"]
    options += [
        "--save_total_limit",
        "none",
        "--async_save",
        "off",
        "--aspect=--odd",
        "--lora_target_modules",
        "q",
        "v",
    ]
    config = parse_train(options)
    assert parse_train(config.to_arguments()) == config
    also = parse_train(config.to_arguments(["learning_rate", "report_to", "epsilon_high"]))
    assert also == config and {"learning_rate", "report_to", "epsilon_high"} < also.explicit
