"""The table of a pretrained model and the figures of templates, on a tiny model and a few words."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_folder

from bench.learning import pretrained, templates
from dwrl_fast.templates import Template


def pairs(folder: Path, name: str, count: int, start: int) -> Path:
    rows = [
        {"prompt": f"{i:03d}", "chosen": f"{i:03d}"[::-1] + "1", "rejected": "0"} for i in range(start, start + count)
    ]
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    data = pairs(pairs(tmp_path / "mine", "train.jsonl", 14, 0), "test.jsonl", 6, 100)
    return ["--model", str(tiny_folder(tmp_path / "tiny")), "--data", str(data)]


def run_of(name: str, factor: float, seed: int, accuracy: float, nll: float = 1.0) -> dict[str, Any]:
    return {"variant": name, "factor": factor, "seed": seed, "swept": {"report": {"accuracy": accuracy, "nll": nll}}}


def test_the_factor_is_that_of_the_pairs_of_the_sweep() -> None:
    runs = [
        run_of("bt", 1.0, 0, 0.6),
        run_of("bt", 3.0, 0, 0.7),
        run_of("bt", 9.0, 1, 0.9),
        run_of("dwrl", 1.0, 0, 1.0),
    ]
    assert pretrained.best_factor(runs, "bt", 0) == 3.0
    assert pretrained.best_factor([*runs, run_of("bt", 5.0, 0, 0.7, nll=0.5)], "bt", 0) == 5.0


def test_credits_are_means_over_runs_of_the_same_pairs() -> None:
    runs = [{"greedy": {"scores": [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]}}, {"greedy": {"scores": [[3.0, 0.0]] * 3}}]
    assert np.array_equal(pretrained.credits(runs), [1.0, 0.5, 0.75])


@pytest.mark.slow
def test_a_table_goes_on_where_it_was(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "table.json"
    small = ["--rows", "8", "--swept", "6", "--held_out", "6", "--batch", "4", "--tokens", "4", "--factors", "1", "3"]
    argv = ["pretrained", *given, *small, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*argv, "--variants", "zero-shot", "bt, 1/2", "--seeds", "0"])
    pretrained.main()
    [cell] = json.loads(file.read_text())["cells"]
    assert [(run["variant"], run["factor"]) for run in cell["runs"]] == [
        ("zero-shot", 1),
        ("bt, 1/2", 1),
        ("bt, 1/2", 3),
    ]
    zero, half, _ = cell["runs"]
    assert len(zero["4_thoughts"]["scores"]) == len(half["greedy"]["scores"]) == len(half["swept"]["scores"]) == 6
    assert zero["greedy"]["report"]["groups"] == 6 and half["tokens"]["naive_tokens"] > 0 and "swept" not in zero
    monkeypatch.setattr(sys, "argv", [*argv, "--variants", "bt", "dwrl", "bt, 1/2", "--seeds", "0", "1"])
    pretrained.main()
    [again] = json.loads(file.read_text())["cells"]
    assert again["runs"][:3] == cell["runs"]
    made = [(run["variant"], run["seed"]) for run in again["runs"][3:]]
    assert made == [("bt", 0)] * 2 + [("dwrl", 0)] * 2 + [("bt", 1), ("dwrl", 1), ("bt, 1/2", 1)]
    said = " ".join(capsys.readouterr().out.split())
    assert "held-out accuracy: mine" in said and "less bt" in said


def test_templates_are_asked_once(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "templates.json"
    given[-1] += "/test.jsonl"
    shown = Template("3 {aspect}", "5", ("1", "0"))  # what its tokenizer has words for
    monkeypatch.setattr(templates, "WORDINGS", {"numbers": shown})
    monkeypatch.setattr(sys, "argv", ["t", *given, "--tokens", "4", "--json", str(file), "--only", "dialog", "numbers"])
    templates.main()
    found = json.loads(file.read_text())
    assert [one["template"] for one in found["templates"]] == ["dialog", "numbers"]
    for one in found["templates"]:
        figures = one["figures"]
        assert 0 < figures["mass"] <= 1 and 0 <= figures["truncated"] <= 1 and 0 < figures["tokens"] <= 4
        assert figures["spread"] > 0 and one["report"]["groups"] == 6
    templates.main()
    assert json.loads(file.read_text()) == found and "label mass" in capsys.readouterr().out
