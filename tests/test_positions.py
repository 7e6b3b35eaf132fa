"""Everything that scores warns once about sequences with more tokens than the model has positions, not later than
at the first one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from judging import saved_model
from rich.console import Console
from tiny import tiny_dialog, tiny_rows
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from dwrl_fast import compare, evaluate, train
from dwrl_fast.data import Preference
from dwrl_fast.doctor import parse_doctor
from dwrl_fast.doctor.__main__ import run as examine
from dwrl_fast.embedded.tokenizer import IDS
from dwrl_fast.errors import ModelError, UserError
from dwrl_fast.log import logger
from dwrl_fast.models.model import GenerativeModel, ScalarModel
from dwrl_fast.models.pretrained import CARD, save_pretrained
from dwrl_fast.scoring.scorer import Scorer

SAID = "but the model has positions for"


def with_positions(model: Path, count: int) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": count}))
    return model


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if SAID in record.getMessage()]


def longest_of(scorer: Scorer, rows: Sequence[Preference]) -> int:
    """The tokens that the longest sequence of `rows` has with a thought of 6 tokens, if there is one."""
    found = [one for each in scorer.score_groups(rows) for one in each.group.flat]
    if not scorer.thinks:
        return max(len(one.ids) for one in found)
    return max(len(one.ids) + 6 - (one.thought.stop - one.thought.start) for one in found)


@pytest.mark.parametrize("name", ["dwrl", "bt", "sft", "gram", "judge"])
def test_a_scorer_warns_once(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    model = saved_model(folder, name)
    whole = Scorer.from_pretrained(model, dtype="fp32")
    rows = tiny_rows(folder)
    longest = longest_of(whole, rows)
    assert not said(caplog)
    for count, expected in ((longest, []), (longest - 1, [f"may reach {longest} tokens, {SAID} {longest - 1}:"])):
        scorer = Scorer.from_pretrained(with_positions(model, count), dtype="fp32")
        for part in (rows, rows[:2]):
            scorer.score_groups(part)
        found = said(caplog)
        assert len(found) == len(expected) and all(text in found[0] for text in expected)


def with_learned_positions(folder: Path, name: str, count: int) -> Path:
    """A GPT-2, which embeds each of `count` positions."""
    size = {"n_positions": count, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ids = {"vocab_size": len(IDS), "bos_token_id": None, "eos_token_id": IDS["<|end|>"], "pad_token_id": IDS["<|pad|>"]}
    config = GPT2Config(num_labels=1, **size, **ids)
    model: Any = ScalarModel(GPT2ForSequenceClassification(config)) if name == "bt" else None
    model = model or GenerativeModel(GPT2LMHeadModel(config))
    card = json.loads((saved_model(folder, name) / CARD).read_text())
    save_pretrained(folder / f"{name} {count}", model, tiny_dialog(), card)
    return folder / f"{name} {count}"


@pytest.mark.parametrize("name", ["dwrl", "bt", "sft"])
def test_past_learned_positions_nothing_is_scored(folder: Path, name: str) -> None:
    """Not even where the thought might become shorter than its limit."""
    rows = tiny_rows(folder)
    whole = Scorer.from_pretrained(with_learned_positions(folder, name, 200), dtype="fp32")
    longest = longest_of(whole, rows)
    Scorer.from_pretrained(with_learned_positions(folder, name, longest), dtype="fp32").score_groups(rows)
    model = with_learned_positions(folder, name, longest - 1)
    scorer = Scorer.from_pretrained(model, dtype="fp32")
    with pytest.raises(ModelError, match=rf"may reach {longest} tokens, {SAID} {longest - 1}, .* shorten the texts"):
        scorer.score_groups(rows)
    assert not scorer.tokens
    if whole.thinks:
        Scorer.from_pretrained(model, dtype="fp32", max_completion_length=5).score_groups(rows)


def test_a_run_refuses_held_out_rows_past_learned_positions(folder: Path, tmp_path: Path) -> None:
    rows = tiny_rows(folder)
    whole = Scorer.from_pretrained(with_learned_positions(folder, "dwrl", 200), dtype="fp32")
    model = with_learned_positions(folder, "dwrl", longest_of(whole, rows))
    held_out = {"prompt": "3 5 0", "chosen": "5", "rejected": "2 7 1 " * 20}
    (tmp_path / "held-out.jsonl").write_text(json.dumps(held_out))
    given = ["--model_name_or_path", f"{model}", "--dataset_name", f"{folder}/pairs.jsonl", "--max_steps", "1"]
    given += ["--output_dir", f"{tmp_path}/run", "--max_completion_length", "6"]
    with pytest.raises(ModelError, match=SAID):
        train.main([*given, "--eval_dataset_name", f"{tmp_path}/held-out.jsonl"])


def test_a_stream_is_as_long_as_allowed_for_dry_run_and_doctor_too(folder: Path) -> None:
    given = ["--model_name_or_path", f"{with_learned_positions(folder, 'dwrl', 200)}", "--max_steps", "1"]
    given += ["--dataset_name", f"{folder}/pairs.jsonl", "--max_completion_length", "6", "--streaming"]
    for argv in (given, [*given, "--dry_run"]):
        with pytest.raises(UserError, match=f"may reach 306 tokens, {SAID} 200"):
            train.main([*argv, "--max_length", "300", "--output_dir", f"{folder}/run"])
    report = examine(parse_doctor([*given, "--max_length", "300"]), Console(quiet=True))
    assert [found.name for found in report.findings if found.status == "fail"] == ["model"]
    train.main([*given, "--max_length", "194", "--dry_run"])


@pytest.mark.parametrize("name", ["dwrl", "bt"])
@pytest.mark.parametrize("run", ["evaluate", "compare"])
def test_the_commands_warn_before_the_first_score(
    folder: Path, name: str, run: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = str(saved_model(folder, name)), ["--dataset_name", str(folder / "pairs.jsonl"), "--dtype", "fp32"]
    before: list[int] = []
    scored = Scorer.score_groups

    def watched(self: Scorer, *args: Any, **options: Any) -> Any:
        before.append(len(said(caplog)))
        return scored(self, *args, **options)

    def main() -> None:
        caplog.clear()
        if run == "evaluate":
            evaluate.run(evaluate.parse_evaluate(["--model_name_or_path", model, *data]), Console())
        else:
            compare.run(compare.parse_compare([model, model, *data]), Console())

    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(Scorer, "score_groups", watched)
    main()
    assert not said(caplog)
    with_positions(Path(model), 8)
    before.clear()
    main()
    models = 1 if run == "evaluate" else 2
    assert before[0] == 1 and len(said(caplog)) == models
