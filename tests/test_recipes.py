"""The recipes: the files compose the papers' experiments, which dry-run with substitute tokenizers and rows."""

import dataclasses
import functools
import gzip
import io
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chats import contents_of, real_tokenizer
from conftest import ROOT
from fakes import FakePolicy
from rich.console import Console

from dwrl_fast import train
from dwrl_fast.batching.layout import Layout
from dwrl_fast.config import TrainConfig, parse_train
from dwrl_fast.data import read_preferences
from dwrl_fast.dialog import Dialog
from dwrl_fast.encode import Group
from dwrl_fast.errors import ConfigError, UserError
from dwrl_fast.methods import METHODS
from dwrl_fast.options import checked
from dwrl_fast.ranks import Ranks
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.training.dry_run import dry_run, guessed_groups, preparation

FOLDER = ROOT / "recipes"
KINDS = ("backbones", "data", "methods", "combinations")  # in the order of --config
DATA = sorted(path.stem for path in (FOLDER / "data").glob("*.yaml"))


def experiments() -> Iterator[str]:
    """The papers' experiments. Each is the paper and the names of its files, in the order of KINDS."""
    for paper, entries in yaml.safe_load((FOLDER / "papers.yaml").read_text(encoding="utf-8")).items():
        for entry in entries:
            for names in itertools.product(*(entry[kind] for kind in KINDS if kind in entry)):
                yield " ".join((paper, *names))


NAMES = list(experiments())
QUICK = {  # one of each kind of data, tokenizer, template and method
    "dwrl qwen2.5-3b-instruct hh dwrl",
    "dwrl llama3.2-3b-instruct if bt-prefilled",
    "dwrl llama3.1-8b-instruct math grpo-point",
    "dwrl rm-r1-7b hh judge no-training",
    "genrm llama3.1-8b-instruct ultrafeedback star-rationalizer rounds-ultrafeedback",
    "genrm llama3.1-8b-instruct ultrainteract genrm",
    "formats llama3.2-1b binary sft",
    "formats llama3.2-1b single dpo from-sft-llama3.2-1b",
}
ROWS = 24  # per stand-in


def files(name: str) -> list[Path]:
    return [FOLDER / kind / f"{stem}.yaml" for kind, stem in zip(KINDS, name.split()[1:], strict=False)]


def composed(name: str) -> list[str]:
    """The arguments that compose an experiment."""
    return ["--config", *map(str, files(name))]


@functools.cache
def parsed(name: str) -> TrainConfig:
    return parse_train(composed(name))


def lines(shared: Path, name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(shared / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, itertools.islice(file, ROWS))


@pytest.fixture(scope="session")
def stand_ins(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for the train.jsonl and test.jsonl of the recipes, in the same subfolders."""
    folder = tmp_path_factory.mktemp("stand_ins")
    rows = {
        "data/hh": [*lines(shared, "hh/hh_train")],
        "data/ultrafeedback": [*lines(shared, "if/ultrafeedback_train")],
        "data/ultrafeedback-14407-784": [*lines(shared, "if/ultrafeedback_train")],
        "data/gsm8k": [*lines(shared, "math/gsm8k_real_train")],
        "data/ultrainteract": [*lines(shared, "math/gsm8k_real_train")],
        "data/formats/binary": [*lines(shared, "hh/hh_train")],
        "data/formats/binarymagn": [
            row | {"magnitude": 1 + i % 2} for i, row in enumerate(lines(shared, "hh/hh_train"))
        ],
        "data/formats/ranking": [*lines(shared, "graded/qa_feedback_rank4")],
        "data/formats/single": [
            {"prompt": row["prompt"], "completion": text, "score": score}
            for row in lines(shared, "graded/webgpt_magnitude")
            for text, score in zip(row["responses"], row["scores"], strict=True)
        ],
    }
    for place, some in rows.items():
        (folder / place).mkdir(parents=True)
        for name in ("train.jsonl", "test.jsonl"):
            (folder / place / name).write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


def run_dry(name: str, stand_ins: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The output of an experiment's dry run, with stand-ins for its rows and tokenizer."""
    config = parsed(name)
    family = "llama3" if "llama" in str(config.model_name_or_path).lower() else "qwen2.5"
    arguments = [*composed(name), "--dry_run", "--tokenizer_name_or_path", str(shared / "tokenizers" / family)]
    arguments += ["--eval_dataset_name", *(str(stand_ins / part.dataset_name) for part in config.eval_dataset_name)]
    if config.dataset_name is not None:
        arguments += ["--dataset_name", str(stand_ins / config.dataset_name)]
    monkeypatch.setattr("dwrl_fast.dialog.chat.ContentTokenizer", contents_of)
    monkeypatch.setattr(
        "dwrl_fast.models.pretrained.load_tokenizer", lambda name: real_tokenizer(shared, Path(name).name)
    )
    return said(train.configure(arguments))


def said(config: TrainConfig) -> str:
    out = io.StringIO()
    dry_run(config, Console(file=out, width=200))
    return out.getvalue()


def test_the_experiments_are_of_all_files_and_methods() -> None:
    used = [path for name in NAMES for path in files(name)]
    assert set(used) == {path for kind in KINDS for path in (FOLDER / kind).iterdir()}
    assert {parsed(name).method for name in NAMES} == set(METHODS)
    assert sorted(NAMES) == sorted(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_valid_and_each_line_of_its_files_counts(name: str) -> None:
    assert parsed(name).without_effect() == {}
    reached = TrainConfig().to_dict()
    for path in files(name):
        values = checked(TrainConfig, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        assert [option for option, value in values.items() if reached[option] == value and option != "method"] == []
        reached |= values


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("dwrl ", "btpo "))])
def test_the_settings_of_the_paper(name: str) -> None:
    config = parsed(name)
    assert (config.rollout_batch_size, config.minibatch_size, config.num_train_epochs) == (256, 32, 2)
    assert (config.num_generations, config.max_completion_length, config.temperature) == (4, 1000, 1.0)
    assert (config.learning_rate == 5e-7) is (config.method not in ("bt", "gram"))
    assert config.misalignment_weight is not name.endswith("unweighted")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("formats ")])
def test_the_settings_of_the_data_format_paper(name: str) -> None:
    config = parsed(name)
    assert config.learning_rate == {"sft": 2e-5, "bt": 2e-5, "dpo": 1e-6}[config.method]
    assert (config.minibatch_size, config.num_train_epochs, config.lr_scheduler_type) == (64, 1, "linear")
    assert config.max_length == 2048
    later = config.method != "sft"  # starts from the sft run, whose folder has the tokenizer
    assert str(config.model_name_or_path).startswith("runs/formats/") is later
    assert (config.tokenizer_name_or_path is None) is later


@pytest.mark.parametrize("name", [name for name in NAMES if "star-" in name])
def test_a_round_is_a_third_of_the_rows(name: str) -> None:
    config = parsed(name)
    rows = {"ultrafeedback": 61_135, "ultrainteract": 218_522}[name.split()[2]]
    assert 0 <= 3 * config.rollout_batch_size - rows < 3 * config.minibatch_size


@pytest.mark.parametrize("name", sorted(QUICK))
def test_dry_run(name: str, stand_ins: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ready" in run_dry(name, stand_ins, shared, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - QUICK))
def test_dry_run_of_all_others(name: str, stand_ins: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ready" in run_dry(name, stand_ins, shared, monkeypatch)


@pytest.mark.parametrize("name", DATA)
def test_a_data_file_tells_the_command_that_makes_its_rows(name: str) -> None:
    """The command in its comment equals the command that --dry_run prints."""
    text = (FOLDER / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    told = [line.removeprefix("# ") for line in text.splitlines() if "--prepare" in line]
    given = yaml.safe_load(text)
    wanted = {preparation(given["dataset_name"]), preparation(given["eval_dataset_name"])}
    assert wanted == set(told or [""])


def test_the_page_about_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names every file, and its commands can be parsed, including those with the files that it writes."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    stems = {path.stem for kind in KINDS for path in (FOLDER / kind).iterdir()}
    assert stems - set(re.findall(r"`([^`\s]+)`", page)) == set()
    (tmp_path / "recipes").symlink_to(FOLDER)
    monkeypatch.chdir(tmp_path)
    for text, name in re.findall(r"^echo '(.*)' > (\S+)$", page, re.M):
        Path(name).write_text(text, encoding="utf-8")
    commands = re.findall(r"^ *python -m dwrl_fast\.train (.*)$", page.replace("\\\n", " "), re.M)
    assert commands
    for command in commands:
        parse_train(shlex.split(command, comments=True))


@pytest.mark.parametrize("base", sorted(name.split()[1] for name in NAMES if name.endswith(" sft")))
def test_a_combination_tells_the_sft_run_that_it_starts_from(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (FOLDER / "combinations" / f"from-sft-{base}.yaml").read_text(encoding="utf-8")
    told = parse_train(" ".join(re.findall(r"^#   (--.*)$", text, re.M)).split())
    assert dataclasses.replace(told, output_dir=None) == parsed(f"formats {base} binary sft")
    assert yaml.safe_load(text)["model_name_or_path"] == f"{told.output_dir}/model"


# --dry_run itself


def tiny_arguments(folder: Path, *more: str) -> list[str]:
    own = ["--model_name_or_path", f"{folder}/tiny", "--dataset_name", f"{folder}/pairs.jsonl"]
    sizes = ["--rollout_batch_size", "8", "--minibatch_size", "4", "--max_completion_length", "6"]
    return [*own, *sizes, "--dry_run", *more]


def test_what_is_said_is_what_would_run(folder: Path) -> None:
    text = said(parse_train(tiny_arguments(folder, "--eval_dataset_name", f"{folder}/pairs.jsonl")))
    assert "24 groups in 3 rollout batches of up to 8; 6 minibatches of 4" in text
    assert "12 rows read, 12 used, 0 dropped" in text
    assert "LlamaForCausalLM" in text and "with thoughts assumed to have 6 tokens" in text
    assert text.rstrip().endswith("the same command without --dry_run runs it")


def test_nothing_is_loaded_or_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tiny" / "model.safetensors").unlink()
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    train.main(tiny_arguments(folder, "--output_dir", "run"))
    assert sorted(folder.rglob("*")) == before


SAMPLING = ("dwrl", "btpo", "grpo-pair", "grpo-point")


@pytest.mark.parametrize("method", [*SAMPLING, "bt", "gram", "genrm", "pairrm", "sft", "dpo"])
def test_tokens_are_those_of_the_rollout(folder: Path, method: str) -> None:
    """Compared with the method's own rollout. If the method samples, the thoughts and all tokens after them do not
    count.
    """
    policy = FakePolicy(parse_train([*tiny_arguments(folder), "--method", method, "--dtype", "fp32"]))
    rows = read_preferences(folder / "pairs.jsonl").rows[:4]
    made, _ = policy.rollout(rows)
    guessed = guessed_groups(rows, policy.method, 6)
    assert [len(group.flat) for group in guessed] == [len(group.flat) for group in made]
    counted = contexts if method in SAMPLING else naive
    assert counted(made) == counted(guessed)


def test_tokens_of_prefilled_thoughts(folder: Path) -> None:
    config = parse_train([*tiny_arguments(folder), "--method", "bt", "--prefilled_thoughts"])
    dialog, rows = load_dialog(config), read_preferences(folder / "pairs.jsonl").rows[:4]
    assert isinstance(dialog, Dialog)
    thought = [*[3] * 4, dialog.end_id]
    wanted = sum(
        len(dialog.sequence(dialog.context(row.prompt, response), thought).ids)
        for row in rows
        for response in row.responses
    )
    assert naive(guessed_groups(rows, METHODS["bt"](config, dialog), 5)) == wanted


def contexts(groups: list[Group]) -> int:
    """The number of tokens before the thoughts, which is not guessed. It does not depend on the order of responses."""
    return sum(sequence.thought.start for group in groups for sequence in group.flat)


def naive(groups: list[Group]) -> int:
    return sum(batch.naive_tokens for batch in Layout("packed", 4096, 0, torch.device("cpu")).batches(groups))


def test_all_that_stands_in_the_way_is_said(tmp_path: Path) -> None:
    arguments = ["--model_name_or_path", f"{tmp_path}/no/such", "--dry_run"]
    files = ["--dataset_name", "data/hh/train.jsonl", "--eval_dataset_name", "data/ultrafeedback-30-20/test.jsonl"]
    with pytest.raises(UserError) as error:
        said(parse_train([*arguments, *files]))
    text = str(error.value)
    assert "--tokenizer_name_or_path" in text
    assert "python -m dwrl_fast.data --prepare hh --output_dir data/hh" in text
    assert "--prepare ultrafeedback --train_rows 30 --test_rows 20 --output_dir data/ultrafeedback-30-20" in text


def test_a_folder_with_a_run_is_refused(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"holds config\.yaml already"):
        train.main(tiny_arguments(folder, "--output_dir", f"{folder}/run"))


def test_rows_that_are_all_too_long_stand_in_the_way(folder: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 12 encoded rows can be used; 12 left out: longer than"):
        said(parse_train(tiny_arguments(folder, "--max_length", "2")))


def test_a_tokenizer_that_is_too_large_for_the_model(folder: Path) -> None:
    config = json.loads((folder / "tiny" / "config.json").read_text())
    (folder / "tiny" / "config.json").write_text(
        json.dumps(config | {"vocab_size": 10, "pad_token_id": None, "eos_token_id": None})
    )
    with pytest.raises(UserError, match="they do not belong together"):
        said(parse_train(tiny_arguments(folder)))


def test_a_rationalizer_of_another_kind(folder: Path) -> None:
    more = ["--method", "star-rationalizer", "--rationalizer_template", "pairwise"]
    with pytest.raises(UserError, match="rationalizer_template = pairwise: its kind is pairwise"):
        said(parse_train(tiny_arguments(folder, *more)))


def test_without_a_tokenizer_the_rest_is_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        train.main(tiny_arguments(folder))
    text = capsys.readouterr().out
    assert "12 rows read" in text and "6 minibatches of 4" in text and "LlamaForCausalLM" in text


def test_offload_needs_torchrun_but_not_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_train(["--cpu_offload"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    dry_run(config, Console(quiet=True), Ranks(mesh=object()))
    with pytest.raises(UserError, match="cpu_offload needs GPUs and processes started by torchrun"):
        dry_run(config, Console(quiet=True))


def test_the_embedded_task_has_nothing_to_look_at() -> None:
    assert "embedded task" in said(train.configure(["--dry_run"]))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("data/gsm8k/test.jsonl", "python -m dwrl_fast.data --prepare gsm8k --output_dir data/gsm8k"),
        ("x/rmb/train.jsonl", "python -m dwrl_fast.data --prepare rmb --source COPY --output_dir x/rmb"),
        ("data/gsm8k/other.jsonl", ""),
        ("data/formats/single/train.jsonl", ""),
        ("train.jsonl", ""),
    ],
)
def test_the_command_that_makes_a_file(name: str, command: str) -> None:
    assert preparation(name) == command


def test_the_model_that_writes_is_tried_too(folder: Path) -> None:
    writer = Path(shutil.copytree(folder / "tiny", folder / "writer"))
    asked = ["--method", "star-rationalizer", "--rationalizer_model", str(writer)]
    assert "all of it works" in said(parse_train([*tiny_arguments(folder), *asked]))
    (writer / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load a model from .*writer"):
        said(parse_train([*tiny_arguments(folder), *asked]))
