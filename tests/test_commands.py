"""The two main commands from the command line: a small embedded task, real options, bad input."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from held_out import share_won
from rich.console import Console
from test_embedded import SIZES, TINY
from tiny import tiny_pairs
from transformers import AutoModelForCausalLM

import dwrl_fast
from dwrl_fast import embedded, evaluate, train
from dwrl_fast.config import EvaluateConfig, TrainConfig, parse_evaluate, parse_train
from dwrl_fast.errors import UserError
from dwrl_fast.options import Options, option_fields

SMALL = ["--rollout_batch_size", "8", "--minibatch_size", "4", "--max_steps", "2", "--max_completion_length", "6"]


@pytest.fixture
def small_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small version of the default run: its own code and recipes, with fewer steps."""
    monkeypatch.setattr(embedded, "prepare", functools.partial(embedded.prepare, sizes=SIZES, plan=TINY))
    shipped = embedded.recipe

    def recipe(method: str) -> Path:
        small = yaml.safe_load(shipped(method).read_text()) | {
            "rollout_batch_size": 8,
            "minibatch_size": 4,
            "max_steps": 2,
        }
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump(small))
        return tmp_path / f"{method}.yaml"

    monkeypatch.setattr(embedded, "recipe", recipe)


@pytest.fixture
def silent() -> Console:
    return Console(quiet=True)


def own_data(folder: Path) -> list[str]:
    return ["--model_name_or_path", f"{folder}/tiny", "--dataset_name", f"{folder}/pairs.jsonl", *SMALL]


def contents(pairs: Path) -> set[str]:
    """The prompts of a file of pairs."""
    return {json.loads(line)["prompt"][0]["content"] for line in pairs.read_text().splitlines()}


@pytest.mark.usefixtures("small_embedded")
def test_without_arguments_the_embedded_task_runs_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train.main(["--output_dir", str(run), "--seed", "3"])
    result = json.loads((run / "result.json").read_text())
    made = run / "embedded"
    for name, model, votes in (
        ("before", made / "model", 1),
        ("after", run / "model", 1),
        ("bt", run / "bt" / "model", 1),
        ("before_4_thoughts", made / "model", 4),
        ("after_4_thoughts", run / "model", 4),
    ):
        assert result[f"accuracy_{name}"] == share_won(model, made / "test.jsonl", votes, seed=3), name
    assert contents(made / "test.jsonl").isdisjoint(contents(made / "train.jsonl"))
    assert result["seed"] == 3 and {"torch", "transformers", "python"} <= set(result["versions"])
    assert {"warm up", "rollout", "score", "thought", "evaluate", "bt"} <= set(result["seconds_by_stage"])
    assert parse_train(["--config", str(run / "config.yaml")]).to_dict() == {
        **train.configure(["--seed", "3"]).to_dict(),
        "output_dir": str(run),
    }
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "bt on the same pairs" in printed and "--model_name_or_path MODEL --dataset_name pairs.jsonl" in printed
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (made / "model", run / "model")
    )
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("small_embedded")
def test_the_embedded_run_repeats_itself_and_resumes(tmp_path: Path, silent: Console) -> None:
    def go(name: str, *more: str) -> dict:
        base = ["--output_dir", str(tmp_path / name), "--save_steps", "1", *more]
        return train.run(train.configure(base), silent)

    first, second = go("a"), go("b")
    same = [name for name in first if name.startswith(("accuracy", "report"))]
    assert same and all(first[name] == second[name] for name in same)
    resumed = go("b", "--resume_from_checkpoint", "latest")
    assert all(first[name] == resumed[name] for name in same), "a finished run that is resumed has nothing to do"
    kept = (tmp_path / "a" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"holds config\.yaml, model"):
        go("a")
    with pytest.raises(UserError, match="seed was 0, is 9"):
        go("a", "--resume_from_checkpoint", "latest", "--seed", "9")
    assert (tmp_path / "a" / "config.yaml").read_text() == kept
    assert train.configure(["--config", str(tmp_path / "a" / "bt" / "config.yaml")]).method == "bt"


def test_own_pairs_from_a_saved_configuration(folder: Path, silent: Console) -> None:
    run = train.configure([*own_data(folder), "--output_dir", str(folder / "run")])
    result = train.run(run, silent)
    assert "accuracy_after" not in result, "without held-out pairs nothing is evaluated"
    again = train.configure(["--config", str(folder / "run" / "config.yaml"), "--output_dir", str(folder / "again")])
    train.run(again, silent)
    models = [AutoModelForCausalLM.from_pretrained(folder / name / "model").state_dict() for name in ("run", "again")]
    assert all(torch.equal(p, models[1][name]) for name, p in models[0].items())


def test_drawn_weights_from_a_config_file(folder: Path, silent: Console) -> None:
    options = own_data(folder)
    options[:2] = ["--model_config", f"{folder}/tiny/config.json", "--tokenizer_name_or_path", f"{folder}/tiny"]
    more = ["--output_dir", str(folder / "run"), "--score_normalization", "yes_no", "--alternate", "joint"]
    assert train.run(train.configure([*options, *more]), silent)["steps"] == 2


def test_evaluate_reads_what_train_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = folder / "pairs.jsonl", folder / "out"
    options = ["--model_name_or_path", f"{folder}/tiny", "--dataset_name", str(pairs)]
    greedy = evaluate.run(parse_evaluate([*options, "--output_dir", str(out)]), Console())
    assert greedy.groups == 12 and f"accuracy {greedy.accuracy:.3f}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(len(row["thoughts"]) == 2 for row in rows)
    assert greedy.accuracy == pytest.approx(sum(row["scores"][0] > row["scores"][1] for row in rows) / 12)
    voted = evaluate.run(parse_evaluate([*options, "--votes", "5", "--limit", "6"]), Console(quiet=True))
    assert voted.groups == 6 and voted.nll != greedy.nll


def test_margins_and_aspects_reach_the_model(folder: Path, silent: Console) -> None:
    template = {"evaluate": "check {aspect}", "rate": "rate {aspect}", "labels": ["Yes", "No"]}
    card = json.loads((folder / "tiny" / "preference_model.json").read_text())
    card["dialog"] |= {"template": template, "aspect": "0"}
    (folder / "tiny" / "preference_model.json").write_text(json.dumps(card))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]

    unseen = tiny_pairs(folder / "unseen.jsonl", seed=1)
    assert contents(unseen).isdisjoint(contents(folder / "pairs.jsonl"))

    def loss(name: str, change: dict, *more: str) -> float:
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row | change) + "\n" for row in rows))
        options = [*own_data(folder), "--output_dir", str(folder / name), "--eval_steps", "1", *more]
        result = train.run(train.configure([*options, "--eval_dataset_name", str(unseen)]), silent)
        log = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert ["eval_greedy" in row for row in log] == [True, False], "the last step's is accuracy_after"
        assert result["accuracy_after"] == share_won(folder / name / "model", unseen)
        return log[0]["loss"]

    plain = loss("plain", {})
    assert loss("same", {"aspect": "0", "margin": 0.0}) == plain
    assert loss("margin", {"margin": 3.0}) > plain + 1
    assert loss("aspect", {"aspect": "1"}) != plain != loss("option", {}, "--aspect", "1")
    saved = json.loads((folder / "option" / "model" / "preference_model.json").read_text())
    assert saved["dialog"]["aspect"] == "1", "what a model was trained with goes with it"


def bad_tokenizer(folder: Path) -> list[str]:
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text((folder / "tiny" / "config.json").read_text())
    return ["--model_config", f"{folder}/bare/config.json", "--dataset_name", f"{folder}/pairs.jsonl"]


def small_vocabulary(folder: Path) -> list[str]:
    config = json.loads((folder / "tiny" / "config.json").read_text()) | {
        "vocab_size": 9,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    (folder / "small.json").write_text(json.dumps(config))
    return [
        *("--model_config", f"{folder}/small.json", "--tokenizer_name_or_path", f"{folder}/tiny"),
        *("--dataset_name", f"{folder}/pairs.jsonl"),
    ]


def bt_model(folder: Path) -> list[str]:
    card = json.loads((folder / "tiny" / "preference_model.json").read_text()) | {"method": "bt"}
    (folder / "tiny" / "preference_model.json").write_text(json.dumps(card))
    return own_data(folder)


def a_system_prompt(folder: Path) -> list[str]:
    row = {
        "prompt": [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}],
        "chosen": "3",
        "rejected": "4",
    }
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    return own_data(folder)


BAD: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda f: ["--model_name_or_path", f"{f}/none", "--dataset_name", f"{f}/pairs.jsonl"], "none.*hub name"),
    (lambda f: ["--model_name_or_path", f"{f}/tiny", "--dataset_name", f"{f}/none.jsonl"], r"none\.jsonl"),
    (lambda f: [*own_data(f), "--max_length", "3"], "longer than --max_length 3.*Nothing is left"),
    (lambda f: [*own_data(f), "--learning_rte", "1"], "learning_rate"),
    (bt_model, "trained by bt.*start from"),
    (a_system_prompt, r"1 x .*refuses the roles.*\(line 1\)"),
    (lambda f: [*own_data(f), "--max_completion_length", "0"], "max_completion_length"),
    (bad_tokenizer, "--tokenizer_name_or_path"),
    (small_vocabulary, "embeds only 9.*vocab_size"),
]


@pytest.mark.parametrize("options, said", BAD)
def test_bad_input_says_what_to_do(
    folder: Path, silent: Console, options: Callable[[Path], list[str]], said: str
) -> None:
    with pytest.raises(UserError, match=f"(?s){said}"):
        train.run(train.configure([*options(folder), "--output_dir", str(folder / "run")]), silent)


def test_a_folder_that_was_not_trained_here_is_refused(folder: Path) -> None:
    (folder / "tiny" / "preference_model.json").unlink()
    options = ["--model_name_or_path", f"{folder}/tiny", "--dataset_name", f"{folder}/pairs.jsonl"]
    with pytest.raises(UserError, match=r"preference_model\.json"):
        evaluate.run(parse_evaluate(options), Console(quiet=True))


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_errors_come_without_a_traceback(module: str) -> None:
    command = [sys.executable, "-m", f"dwrl_fast.{module}", "--dataset_nam", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and "dataset_name" in done.stderr and "Traceback" not in done.stderr


def test_the_versions_of_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "version", {"torch": "1", "transformers": "2", "numpy": "3"}.__getitem__)
    assert {"torch": "1", "dwrl_fast": dwrl_fast.__version__}.items() <= train.versions().items()


@pytest.mark.parametrize(("module", "cls"), [("train", TrainConfig), ("evaluate", EvaluateConfig)])
def test_the_help_that_a_command_prints_names_its_options(module: str, cls: type[Options]) -> None:
    """In a separate process: the help page of its parser has each option once, and no others."""
    command = [sys.executable, "-m", f"dwrl_fast.{module}", "--help"]
    page = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    named = re.findall(r"^  --(\w+) ", page.partition("\nExamples")[0], re.M)
    assert sorted(named) == sorted(f.name for f in option_fields(cls))
