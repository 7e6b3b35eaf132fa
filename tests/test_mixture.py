"""File names in options: their forms, refused forms and messages, and short names in figures."""

from pathlib import Path
from typing import Any

import pytest

from dwrl_fast.config import TrainConfig, parse_evaluate, parse_train
from dwrl_fast.data.mixture import Part, short_names
from dwrl_fast.errors import ConfigError

MODEL = ["--model_name_or_path", "m"]
TWO = ["--dataset_mixture", "a.jsonl:0.7", "b.jsonl:0.3"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a.jsonl:0.7", Part("a.jsonl", 0.7)),
        ("a.jsonl:7", Part("a.jsonl", 7.0)),
        ("a.jsonl:5e-1:correctness", Part("a.jsonl", 0.5, "correctness")),
        ("a.jsonl:0.7:harmlessness and tact", Part("a.jsonl", 0.7, "harmlessness and tact")),
        ("a.jsonl", Part("a.jsonl")),
        ("a.jsonl::correctness", Part("a.jsonl", None, "correctness")),
        ("a.jsonl::5", Part("a.jsonl", None, "5")),
        ("5", Part("5")),
        ("5:5", Part("5", 5.0)),
        ("org/name:config:train:0.25", Part("org/name:config:train", 0.25)),
        ("org/name:train:0.25:honesty", Part("org/name:train", 0.25, "honesty")),
        ("org/name:train", Part("org/name:train")),
        ("C:/rows.jsonl:2", Part("C:/rows.jsonl", 2.0)),
        ("day:1/rows.jsonl:2", Part("day:1/rows.jsonl", 2.0)),
        ({"dataset_name": "day:1", "weight": 2, "aspect": "5"}, Part("day:1", 2.0, "5")),
        ({"dataset_name": "a.jsonl", "weight": "5e-1"}, Part("a.jsonl", 0.5)),
        ({"dataset_name": "a:0.7"}, Part("a:0.7")),
    ],
)
def test_how_a_file_is_written(text: Any, part: Part) -> None:
    assert Part.parse(text) == part == Part.parse(part)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a.jsonl:0", "weight = 0: must be a number > 0; leave out a file that is not to be used"),
        ("a.jsonl:-1:correctness", "weight = -1: must be"),
        ("a.jsonl:nan", "weight = nan: must be"),
        ("a.jsonl:inf", "weight = inf: must be"),
        ("a.jsonl:1:2", "1 and 2 could each be the weight; write it in a YAML file"),
        (":0.5", "dataset_name is missing"),
        ("", "expected FILE"),
        (3, "expected FILE"),
        ({"weight": 1}, "dataset_name is missing"),
        ({"dataset_name": "a", "wieght": 1}, "unknown key wieght; the keys are dataset_name, weight, aspect"),
        ({"dataset_name": "a", "weight": True}, "weight = True: expected a number"),
        ({"dataset_name": "a", "weight": "much"}, "weight = 'much': expected a number"),
        ({"dataset_name": "a", "aspect": True}, "aspect = True: expected text, in quotes"),
    ],
)
def test_what_is_no_file(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Part.parse(value)


def test_a_mixture_from_the_command_line_and_from_yaml(tmp_path: Path) -> None:
    line = parse_train([*MODEL, *TWO[:2], "b.jsonl:0.3:correctness", "--seed", "1"])
    assert line.dataset_mixture == (Part("a.jsonl", 0.7), Part("b.jsonl", 0.3, "correctness"))
    assert parse_train([*MODEL, *TWO[:2], "--dataset_mixture=b.jsonl:0.3:correctness"]).dataset_mixture == (
        line.dataset_mixture
    )
    path = tmp_path / "options.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset_mixture:\n  - a.jsonl:0.7\n"
        "  - {dataset_name: b.jsonl, weight: 0.3, aspect: correctness}\neval_dataset_name: held_out.jsonl\n"
    )
    from_yaml = parse_train(["--config", str(path)])
    assert from_yaml.dataset_mixture == line.dataset_mixture
    assert from_yaml.eval_dataset_name == (Part("held_out.jsonl"),)
    from_yaml.save(tmp_path / "saved.yaml")
    assert parse_train(["--config", str(tmp_path / "saved.yaml")]) == from_yaml
    assert from_yaml.own_data == "dataset_mixture" and TrainConfig().own_data == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset_mixture", "a.jsonl:1"], "dataset_mixture names only a.jsonl: a mixture has at least two"),
        (["--dataset_mixture", "a.jsonl:1", "b.jsonl"], r"dataset_mixture: b\.jsonl has no weight\. Write FILE:WEIGHT"),
        (["--dataset_mixture", "a.jsonl:1", "./a.jsonl:2"], r"names a\.jsonl twice: .* the sum of the weights"),
        (["--dataset_mixture", "a.jsonl:0", "b.jsonl:1"], r"dataset_mixture = .*weight = 0: must be a number > 0"),
        (["--dataset_mixture"], "--dataset_mixture has no value"),
        ([*TWO, "--dataset_name", "c.jsonl"], "dataset_name and dataset_mixture exclude each other"),
        (["--dataset_name", "c.jsonl", "--streaming"], r"streaming needs max_steps: .* Give --max_steps"),
        ([*TWO, "--eval_dataset_name", "c.jsonl:2"], r"eval_dataset_name: c\.jsonl has a weight \(2\)"),
        ([*TWO, "--eval_dataset_name", "c.jsonl", "c.jsonl"], r"eval_dataset_name names c\.jsonl twice"),
        ([*TWO, "--shuffle_buffer_size", "0"], r"shuffle_buffer_size = 0 \(in the command line\): must be >= 1"),
        ([*TWO, "--easy_fraction", "0.5"], "easy_fraction belongs to the embedded task, which --dataset_mixture"),
    ],
)
def test_what_contradicts_itself(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_train([*MODEL, *argv])


@pytest.mark.parametrize("argv", [TWO, ["--streaming", "--max_steps", "3"]])
def test_data_needs_a_model_and_streaming_needs_data(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"dataset_mixture needs a model|streaming without dataset_name"):
        parse_train(argv)


def test_evaluate_takes_several_files() -> None:
    config = parse_evaluate([*MODEL, "--dataset_name", "a.jsonl", "b.jsonl::correctness"])
    assert config.dataset_name == (Part("a.jsonl"), Part("b.jsonl", None, "correctness"))
    with pytest.raises(ConfigError, match=r"dataset_name: a\.jsonl has a weight"):
        parse_evaluate([*MODEL, "--dataset_name", "a.jsonl:3"])


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["data/hh.jsonl.gz", "data/gsm8k.parquet"], ["hh", "gsm8k"]),
        (["hh/train.jsonl", "gsm8k/train.jsonl", "c.jsonl"], ["hh/train", "gsm8k/train", "c"]),
        (["x/hh/train.jsonl", "y/hh/train.jsonl"], ["x/hh/train", "y/hh/train"]),
        (["a.jsonl", "a.parquet"], ["a.jsonl", "a.parquet"]),
        (["/a.jsonl", "a.jsonl"], ["/a", "a"]),
        (["org/name:train", "org/name:test"], ["name:train", "name:test"]),
        ([".jsonl", "v1.5"], [".jsonl", "v1.5"]),
    ],
)
def test_what_figures_call_them(names: list[str], short: list[str]) -> None:
    assert short_names(names) == dict(zip(names, short, strict=True))
