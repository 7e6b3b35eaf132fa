"""Everything that scores warns once about sequences with more tokens than the model has positions, not later than
at the first one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from judging import saved_model
from rich.console import Console
from tiny import tiny_rows

from dwrl_fast import compare, evaluate
from dwrl_fast.log import logger
from dwrl_fast.scoring.scorer import Scorer

SAID = "but the model has positions for"


def with_positions(model: Path, count: int) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": count}))
    return model


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if SAID in record.getMessage()]


@pytest.mark.parametrize("name", ["dwrl", "bt", "sft", "gram", "judge"])
def test_a_scorer_warns_once(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    model = saved_model(folder, name)
    whole = Scorer.from_pretrained(model, dtype="fp32")
    rows = tiny_rows(folder)
    groups = whole.score_groups(rows)
    limit = 6 if whole.thinks else 0
    longest = max(
        len(s.ids) + limit - (s.thought.stop - s.thought.start if limit else 0) for g in groups for s in g.group.flat
    )
    assert not said(caplog)
    for count, expected in ((longest, []), (longest - 1, [f"may reach {longest} tokens, {SAID} {longest - 1}:"])):
        scorer = Scorer.from_pretrained(with_positions(model, count), dtype="fp32")
        for part in (rows, rows[:2]):
            scorer.score_groups(part)
        found = said(caplog)
        assert len(found) == len(expected) and all(text in found[0] for text in expected)


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
