"""Options: sources of values, refused values and their messages, the help page, the saved file."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwrl_fast import log
from dwrl_fast.compare import parse_compare
from dwrl_fast.config import EvaluateConfig, TrainConfig, parse_evaluate, parse_train
from dwrl_fast.errors import ConfigError
from dwrl_fast.options import Options, help_page, option_fields

OWN = ["--dataset_name", "pairs.jsonl", "--model_name_or_path", "model"]


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_nothing_given_is_the_papers_method() -> None:
    config = parse_train([])
    assert config == TrainConfig()
    assert config.explicit == frozenset()
    papers = {
        "num_generations": 4,
        "temperature": 1.0,
        "rollout_batch_size": 256,
        "minibatch_size": 32,
        "max_completion_length": 1000,
        "learning_rate": 5e-7,
        "num_train_epochs": 2,
        "epsilon": 0.2,
    }
    assert {name: getattr(config, name) for name in papers} == papers


def test_each_source_overrides_the_one_before(yaml_file: Callable[[str], str]) -> None:
    path = yaml_file("seed: 2\nlearning_rate: 2.0e-6\nweight_decay: 0.2")
    base = {"seed": 1, "learning_rate": 1e-6, "weight_decay": 0.1, "warmup_steps": 1}
    config = parse_train(["--config", path, "--seed", "3"], base)
    assert (config.seed, config.learning_rate, config.weight_decay, config.warmup_steps) == (3, 2e-6, 0.2, 1)
    assert config.max_grad_norm == 1.0
    assert config.explicit == {"seed", "learning_rate", "weight_decay"}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three files of options that contradict each other in part."""
    texts = ("seed: 1\nweight_decay: 0.1\nwarmup_steps: 1", "seed: 2\nweight_decay: 0.2", "seed: 3")
    paths = [tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml")]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return [str(path) for path in paths]


def test_files_are_merged_from_left_to_right(files: list[str]) -> None:
    config = parse_train(["--config", *files, "--max_steps", "4"])
    assert (config.seed, config.weight_decay, config.warmup_steps, config.max_steps) == (3, 0.2, 1, 4)
    assert config.explicit == {"seed", "weight_decay", "warmup_steps", "max_steps"}
    assert parse_train(["--config", *files[::-1]]).seed == 1


def test_the_command_line_is_the_last_wherever_config_stands(files: list[str]) -> None:
    assert parse_train(["--seed", "9", "--config", *files]).seed == 9


def test_a_second_config_adds_its_files(files: list[str]) -> None:
    once = parse_train(["--config", *files])
    assert parse_train(["--config", *files[:2], "--config", files[2]]) == once
    assert parse_train([f"--config={path}" for path in files]) == once


def test_a_list_and_a_mapping_of_a_later_file_replace_the_whole(files: list[str]) -> None:
    first = "columns: {chosen: a, rejected: b}\neval_dataset_name: [x.jsonl, y.jsonl]"
    Path(files[0]).write_text(first + "\ndataset_name: d\nmodel_name_or_path: m")
    Path(files[1]).write_text("columns: {prompt: q}\neval_dataset_name: z.jsonl")
    config = parse_train(["--config", *files])
    assert config.columns == {"prompt": "q"}
    assert [part.dataset_name for part in config.eval_dataset_name] == ["z.jsonl"]


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 4", "Unknown option sed in {}. The nearest is seed"),
        ("seed: x", "seed = 'x' (in {}): expected a whole number"),
        ("seed: -1", "seed = -1 (in {}): must be >= 0"),  # also where a later file replaces it
        ("dtype: fp16", "dtype = fp16 (in {}) is not offered"),
        ("- seed", "--config {}: expected lines of `option: value`, found a list"),
        ("seed: 1\nseed: 2", '--config {}: not valid YAML. seed given more than once\n  in "{}", line 1'),
    ],
)
def test_an_error_names_the_file_that_is_wrong(files: list[str], wrong: int, text: str, message: str) -> None:
    Path(files[wrong]).write_text(text)
    with pytest.raises(ConfigError) as error:
        parse_train(["--config", *files])
    assert message.replace("{}", files[wrong]) in str(error.value)
    assert not any(path in str(error.value) for path in files if path != files[wrong])


def test_a_file_that_is_missing_is_named(files: list[str]) -> None:
    Path(files[1]).unlink()
    with pytest.raises(ConfigError) as error:
        parse_train(["--config", *files])
    assert f"--config {files[1]}: cannot be read" in str(error.value)


def test_every_command_merges(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("dataset_name: d.jsonl\nvotes: 4")
    (tmp_path / "b.yaml").write_text("votes: 8")
    config = ["--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    assert parse_evaluate(["--model_name_or_path", "m", *config]).votes == 8
    assert parse_compare(["A", "B", *config]).votes == 8


def test_a_recipe_may_depend_on_what_was_given() -> None:
    def recipe(given: Mapping[str, Any]) -> dict[str, Any]:
        return {} if "dataset_name" in given else {"max_steps": 40}

    assert parse_train([], recipe).max_steps == 40
    assert parse_train(OWN, recipe).max_steps == -1


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--max_steps", "-1"], "max_steps", -1),
        (["--max_steps=-1"], "max_steps", -1),
        (["--weight_decay", "1e-2"], "weight_decay", 0.01),
        (["--weight_decay", "1"], "weight_decay", 1.0),
        (["--misalignment_weight", "off"], "misalignment_weight", False),
        (["--misalignment_weight=True"], "misalignment_weight", True),
        (["--gradient_checkpointing", "--seed", "1"], "gradient_checkpointing", True),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--epsilon_high", "none"], "epsilon_high", None),
        (["--epsilon_high", "0.3"], "epsilon_high", 0.3),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        ([*OWN, "--columns", "chosen=a", "--columns", "rejected=b=c"], "columns", {"chosen": "a", "rejected": "b=c"}),
        (["--output_dir=--odd"], "output_dir", "--odd"),
    ],
)
def test_values_of_the_command_line(argv: list[str], name: str, value: object) -> None:
    got = getattr(parse_train(argv), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 5e-7", "learning_rate", 5e-7),  # YAML 1.1 reads this as text
        ("learning_rate: 1", "learning_rate", 1.0),
        ("misalignment_weight: off", "misalignment_weight", False),
        ("epsilon_high: null", "epsilon_high", None),
        ("score_normalization: yes_no", "score_normalization", "yes_no"),
        ("columns: {chosen: a}\ndataset_name: d\nmodel_name_or_path: m", "columns", {"chosen": "a"}),
        ("", "seed", 0),
    ],
)
def test_values_of_yaml(yaml_file: Callable[[str], str], text: str, name: str, value: object) -> None:
    got = getattr(parse_train(["--config", yaml_file(text)]), name)
    assert got == value
    assert type(got) is type(value)


def test_columns_of_the_command_line_replace_those_of_yaml(yaml_file: Callable[[str], str]) -> None:
    path = yaml_file("columns: {chosen: a, rejected: b}")
    assert parse_train([*OWN, "--config", path, "--columns", "prompt=q"]).columns == {"prompt": "q"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--num_generation", "4"],
            "Unknown option --num_generation in the command line. The nearest is --num_generations",
        ),
        (["--num-generations", "4"], "The nearest is --num_generations"),
        (["--lr", "1"], "The nearest is --learning_rate"),
        (["--temperatur", "1"], "The nearest is --temperature"),  # prefixes are not abbreviations
        (["--conf", "x"], "The nearest is --config"),
        (["--seed"], "--seed has no value"),
        (["--seed", "--dtype", "fp32"], "--seed has no value"),
        (["--config"], "--config has no value"),
        (["--seed="], "seed = '' (in the command line): expected a whole number"),
        (["--seed", "1.5"], "seed = '1.5' (in the command line): expected a whole number"),
        (["--learning_rate", "fast"], "learning_rate = 'fast' (in the command line): expected a finite number"),
        (["--learning_rate", "nan"], "expected a finite number"),
        (["--learning_rate", "inf"], "expected a finite number"),
        (["--misalignment_weight", "maybe"], "expected true or false (or on, off)"),
        (["--alternate", "never"], "expected one of minibatch, rollout, joint"),
        (["--dtype", "fp16"], "dtype = fp16 (in the command line) is not offered: its gradients underflow"),
        (["--columns", "a"], "--columns a: expected new=old"),
        (["train.jsonl"], "Unexpected argument 'train.jsonl'"),
        (["-seed", "1"], "Unexpected argument '-seed'"),
        (["--explicit", "1"], "Unknown option --explicit"),
        (["--output_dir", ""], "expected text"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: cannot be read (No such file"),
    ],
)
def test_what_the_command_line_may_not_say(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_train(argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_generation: 4", "options.yaml. The nearest is num_generations;"),
        ("seed: 1\nseed: 2", "seed given more than once"),
        ("seed: true", "seed = True (in "),
        ("seed: 1.0", "expected a whole number"),
        ("aspect: on", "in quotes if YAML would read it as another type"),
        ("learning_rate: [1]", "learning_rate = [1] (in "),
        ("columns: [a]", "expected new=old"),
        ("columns: {a: 1}", "expected new=old"),
        ("seed: null", "expected a whole number"),
        ("- seed", "found a list"),
        ("seed: {", "not valid YAML"),
        ("1: 2", "Unknown option 1 in "),
        ("seed: !!python/object/apply:os.getpid []", "not valid YAML"),
    ],
)
def test_what_yaml_may_not_say(yaml_file: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_train(["--config", yaml_file(text)])
    assert message in str(error.value)


def test_a_wrong_recipe_is_not_blamed_on_the_user() -> None:
    with pytest.raises(ConfigError, match=r"seed = 'x' \(in the recipe\)"):
        parse_train([], {"seed": "x"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations = 1: with one thought there is nothing to compare it with"),
        ({"minibatch_size": 512}, "minibatch_size = 512 must divide rollout_batch_size = 256"),
        ({"minibatch_size": 48}, "minibatch_size = 48 must divide"),
        ({"minibatch_size": 0}, "minibatch_size = 0: must be >= 1"),
        ({"epsilon": 1.0}, r"epsilon = 1.0: must be in \(0, 1\)"),
        ({"epsilon": 0.0}, r"epsilon = 0.0: must be in \(0, 1\)"),
        ({"temperature": 0.0}, "temperature = 0.0: must be >= 0.01"),
        ({"easy_fraction": 1.5}, r"easy_fraction = 1.5: must be in \[0, 1\]"),
        ({"max_steps": -5}, "max_steps = -5: must be >= -1"),
        ({"max_steps": 0}, "max_steps = 0 would train nothing"),
        ({"model_name_or_path": "m", "model_config": "c", "dataset_name": "d"}, "exclude each other"),
        ({"dataset_name": "d"}, "dataset_name needs a model: give --model_name_or_path"),
        ({"model_name_or_path": "m"}, "model_name_or_path without dataset_name"),
        ({"columns": {"chosen": "a"}}, "columns without dataset_name"),
        ({"resume_from_checkpoint": "latest"}, "give --output_dir"),
        ({"alternate": "joint", "score_learning_rate": 1e-6}, "score_learning_rate with alternate = joint"),
        ({"alternate": "joint", "optimizer_state": "per_phase"}, "optimizer_state = per_phase with alternate = joint"),
    ],
)
def test_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


def test_one_thought_is_no_contradiction_for_bt() -> None:
    assert TrainConfig(method="bt", num_generations=1).num_generations == 1


def test_the_embedded_tasks_option_is_refused_beside_ones_own_data() -> None:
    with pytest.raises(ConfigError, match="easy_fraction belongs to the embedded task"):
        parse_train([*OWN, "--easy_fraction", "0.5"])


def test_options_without_effect_are_said(caplog: pytest.LogCaptureFixture) -> None:
    log.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="dwrl_fast"):
        parse_train(["--method", "bt", "--num_generations", "8", "--joint_reward", "centred", "--epsilon", "0.2"])
    assert caplog.messages == [
        "num_generations has no effect here: it applies only with method=dwrl or btpo or grpo-pair or grpo-point or "
        "star-sft or star-dpo or star-rationalizer.",
        "joint_reward has no effect here: it applies only with alternate=joint.",
    ]


def test_options_without_effect_are_said_by_every_command(caplog: pytest.LogCaptureFixture) -> None:
    given = ["--dataset_name", "x.jsonl", "--vllm_mode", "server", "--vllm_server_base_url", "http://a:1"]
    for parsed in (parse_evaluate, lambda given: parse_compare(["a", "b", *given])):
        log.warn_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="dwrl_fast"):
            parsed(["--model_name_or_path", "m", *given] if parsed is parse_evaluate else given)
        assert any("vllm_mode has no effect here: it applies only with use_vllm" in said for said in caplog.messages)


@pytest.mark.parametrize(
    "argv", [[], ["--method", "bt", *OWN], [*OWN, "--columns", "chosen=ja: nein #", "--epsilon_high", "0.28"]]
)
def test_the_saved_file_gives_the_same_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, argv: list[str]
) -> None:
    (tmp_path / "part.yaml").write_text("weight_decay: 0.1")
    config = parse_train([*argv, "--config", str(tmp_path / "part.yaml")], {"learning_rate": 1.25e-5})
    config.save(tmp_path / "config.yaml")
    log.warn_once.cache_clear()
    again = parse_train(["--config", str(tmp_path / "config.yaml")])
    assert again == config
    assert again.explicit == {f.name for f in option_fields(TrainConfig)}
    assert not caplog.messages


def test_replacing_an_option_keeps_and_checks_the_rest() -> None:
    config = parse_train(["--seed", "7"])
    assert dataclasses.replace(config, output_dir="runs/x").explicit == {"seed"}
    with pytest.raises(ConfigError):
        dataclasses.replace(config, temperature=-1.0)


@pytest.mark.parametrize("cls", [TrainConfig, EvaluateConfig])
def test_help_names_every_option_with_its_default_within_the_width(cls: type[Options]) -> None:
    page = help_page(cls, width=80)
    head = page[: page.index("\nExamples")]
    assert max(map(len, head.splitlines())) <= 80
    for f in option_fields(cls):
        assert f.metadata["help"].endswith("."), f.name
        assert head.count(f"\n  --{f.name} ") == 1
        paragraph = head.partition(f"\n  --{f.name} ")[2].partition("\n  --")[0]
        assert paragraph.index("[") < paragraph.index("".join(f.metadata["help"].split()[:1]))
    assert "--learning_rate X > 0 [5e-07]" in page or cls is EvaluateConfig


@pytest.mark.parametrize("argv", [["--help"], ["--seed", "1", "-h"]])
def test_help_is_printed_and_ends_the_command(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_train(argv)
    assert end.value.code == 0
    assert "python -m dwrl_fast.train --seed 1" in capsys.readouterr().out


def test_the_examples_of_the_help_parse(tmp_path: Path) -> None:
    for cls, parse in ((TrainConfig, parse_train), (EvaluateConfig, parse_evaluate)):
        for line in cls.examples.replace("\\\n", "").splitlines():
            if line.startswith("python") and "--config" not in line:
                parse(line.split()[3:])


def test_evaluate_needs_a_model_and_pairs() -> None:
    with pytest.raises(ConfigError, match="--model_name_or_path is missing: Folder of a model"):
        parse_evaluate(["--dataset_name", "d"])
    with pytest.raises(ConfigError, match="--dataset_name is missing"):
        parse_evaluate(["--model_name_or_path", "m"])
    config = parse_evaluate(["--model_name_or_path", "m", "--dataset_name", "d", "--votes", "8"])
    assert (config.votes, config.limit, config.aspect) == (8, None, None)


def test_saved_text_is_plain_yaml() -> None:
    assert yaml.safe_load(TrainConfig().to_yaml()) == TrainConfig().to_dict()
