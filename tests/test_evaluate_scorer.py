"""Evaluation uses `dwrl_fast.Scorer`: a report has the same scores as that class."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeSampler
from judging import RUBRIC, A, B, saved_model
from rich.console import Console
from tiny import tiny_rows
from transformers import AutoModelForCausalLM

from dwrl_fast import Scorer, compare, evaluate
from dwrl_fast.compute import step_seed
from dwrl_fast.config import parse_evaluate
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.errors import ConfigError, DataError, ModelError, NotFiniteError
from dwrl_fast.scoring import GenerativeJudging, marginal_scores


@pytest.fixture(scope="module")
def folder(module_folder: Path) -> Path:
    folder = module_folder
    lm = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    lm.save_pretrained(folder / "plain")
    make_tokenizer().save_pretrained(folder / "plain")
    (folder / "rubric.yaml").write_text(RUBRIC)
    return folder


def evaluated(folder: Path, model: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    argv = ["--model_name_or_path", str(model), "--dataset_name", f"{folder}/pairs.jsonl", "--dtype", "fp32"]
    evaluate.run(parse_evaluate([*argv, *more, "--output_dir", str(out)]), Console(quiet=True))
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def said(text: str, i: int) -> str:
    """Verdicts of both kinds, derived from the text. The verdicts of the two orders agree only for some pairs."""
    mixed = sum(place * ord(character) for place, character in enumerate(text))
    return (A if mixed % 3 else B) if " A " in text else f"<s> {mixed % 7} </s>"


@pytest.mark.parametrize("name", ["dwrl", "bt", "sft", "dpo", "gram", "pairrm", "judge", "grpo-point"])
def test_a_report_has_the_scores_of_the_public_class(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one greedy thought per response. The evaluation scores 3 rows per step; the class scores all responses in
    one call, and each response in a separate call.
    """
    model = saved_model(folder, name)
    scorer = Scorer.from_pretrained(model, dtype="fp32")
    if name in ("judge", "grpo-point"):
        says = FakeSampler(scorer.dialog, said)
        monkeypatch.setattr("dwrl_fast.scoring.runtime.TreeSampler", lambda *args, **options: says)
        scorer = Scorer.from_pretrained(model, dtype="fp32")
    lines = evaluated(folder, model, tmp_path / "out", "--generation_batch_size", "3")
    rows = tiny_rows(folder)
    table = [[-math.inf if score is None else score for score in line["scores"]] for line in lines]
    prompts = [row.prompt for row in rows]
    first, second = ([row.responses[k] for row in rows] for k in (0, 1))
    if scorer.compares:
        found = scorer.score(prompts, first, reference=second).tolist()
        each = zip(prompts, first, second, strict=True)
        alone = [scorer.score([x], [y], reference=[z]) for x, y, z in each]
        expected = [a - b for a, b in table]
    else:
        found = scorer.score([*prompts, *prompts], [*first, *second]).tolist()
        alone = [scorer.score([x], [y]) for x, y in zip([*prompts, *prompts], [*first, *second], strict=True)]
        expected = [scores[k] for k in (0, 1) for scores in table]
    assert found == pytest.approx(expected, rel=0, abs=1e-5)
    assert torch.cat(alone).tolist() == pytest.approx(expected, rel=0, abs=1e-5)
    assert len({round(score, 5) for score in expected}) > (1 if name in ("judge", "grpo-point") else 10)


def test_sampled_thoughts_are_those_of_the_same_seed(folder: Path, tmp_path: Path) -> None:
    lines = evaluated(folder, folder / "tiny", tmp_path / "out", "--votes", "3", "--seed", "5")
    scorer = Scorer.from_pretrained(folder / "tiny", dtype="fp32")
    groups = scorer.score_groups(tiny_rows(folder), votes=3, seed=step_seed(5, "rows", 0))
    expected = torch.tensor([line["scores"] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(marginal_scores(groups), expected, rtol=0, atol=1e-5)


def test_nothing_is_judged_past_the_public_class(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[int]] = {"outer": [], "inner": []}

    def watched(kind: Any, name: str) -> None:
        whole = kind.score_groups

        def score_groups(self: Any, rows: Sequence[Any], **options: Any) -> Any:
            asked[name].append(sum(len(row.responses) for row in rows))
            return whole(self, rows, **options)

        monkeypatch.setattr(kind, "score_groups", score_groups)

    watched(Scorer, "outer")
    watched(GenerativeJudging, "inner")
    evaluated(folder, folder / "tiny", tmp_path / "out", "--probe")
    assert asked["outer"] == asked["inner"] and sum(asked["outer"]) == 12 * 2 + 12 * 7
    asked["outer"].clear()
    asked["inner"].clear()
    compare.main([f"{folder}/tiny", f"{folder}/tiny", "--dataset_name", f"{folder}/pairs.jsonl"])
    assert asked["outer"] == asked["inner"] == [24, 24]


def test_tokens_of_a_foreign_loop_are_counted(folder: Path) -> None:
    scorer = Scorer.from_pretrained(folder / "tiny", dtype="fp32")
    scorer.score(["3 5 0"] * 6, [f"{i}" for i in range(6)], votes=4)
    assert 1.5 * scorer.tokens["computed"] < scorer.tokens["naive"]
    before = dict(scorer.tokens)
    scorer.score(["3 5 0"] * 6, [f"{i}" for i in range(6)], votes=4)
    assert dict(scorer.tokens) == {name: 2 * count for name, count in before.items()}


def test_any_causal_model_is_a_judge(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"template": f"{folder}/rubric.yaml", "max_completion_length": 6}
    scorer = Scorer.from_pretrained(folder / "plain", method="judge", dtype="fp32", **options)
    assert (scorer.method, scorer.thinks, scorer.kind) == ("judge", True, "comparison")
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    lines = evaluated(folder, folder / "plain", tmp_path / "out", "--method", "judge", *more)
    found = scorer.score_groups(tiny_rows(folder))
    assert [group.unparsable for group in found] == [line["unparsable"] for line in lines]
    thoughts = [[decoded(scorer, one) for one in each] for one in found for each in one.group.sequences]
    assert thoughts == [some for line in lines for some in line["thoughts"]]
    runtime = scorer._judging.runtime
    object.__setattr__(runtime, "sampler", FakeSampler(runtime.dialog, said))
    assert scorer.probability(["3 5 0"], ["5"], ["7"], votes=2).item() in (0.0, 0.5, 1.0)


def decoded(scorer: Scorer, sequence: Any) -> str:
    return scorer.dialog.tokenizer.decode(sequence.ids[sequence.thought])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"template": "pairwise"}, ConfigError, "template without --method judge"),
        ({"enable_thinking": "on"}, ConfigError, "enable_thinking without --method judge"),
        ({"method": "dwrl"}, ConfigError, r"method = 'dwrl' \(in Scorer.from_pretrained\): expected judge"),
        ({"packing": "trees"}, ConfigError, "packing = 'trees'.*expected one of tree, packed, padded"),
        ({"dtype": "fp16"}, ConfigError, "dtype = fp16.*is not offered"),
        ({"temperature": 0.0}, ConfigError, r"temperature = 0.0 \(in Scorer.from_pretrained\): must be >= 0.01"),
        ({"token_budget": 0}, ConfigError, r"token_budget = 0 \(in Scorer.from_pretrained\): must be >= 1"),
        ({}, ModelError, 'plain has no preference_model.json.*method="judge"'),
    ],
)
def test_wrong_options_of_from_pretrained(
    folder: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Scorer.from_pretrained(folder / "plain", **options)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("{", "cannot be read as a model's card"),
        ('["dwrl"]', "cannot be read as a model's card"),
        ('{"method": "ppo"}', "its method is 'ppo', which is not one of dwrl"),
        ('{"method": "dwrl"}', "it has no dialog"),
    ],
)
def test_a_card_that_is_none(folder: Path, tmp_path: Path, card: str, words: str) -> None:
    (tmp_path / "preference_model.json").write_text(card)
    with pytest.raises(ModelError, match=words):
        Scorer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["bt", "gram", "pairrm", "sft"])
def test_a_model_of_nans_is_said_at_once(folder: Path, tmp_path: Path, name: str) -> None:
    scorer = Scorer.from_pretrained(saved_model(folder, name), dtype="fp32")
    with torch.no_grad():
        next(scorer._judging.runtime.model.parameters()).fill_(math.nan)
    with pytest.raises(NotFiniteError, match=r"prompts\[0\]: the model's score is not a number"):
        scorer.score(["3 5 0"], ["5"], reference=["7"])


def test_a_folder_of_nans_is_said_when_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    """The error names NaN. It does not say that no layout can run the model."""
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    with torch.no_grad():
        lm.model.norm.weight.fill_(math.nan)
    lm.save_pretrained(tmp_path / "tiny")
    for packing in ("tree", "packed", "padded"):
        with pytest.raises(NotFiniteError, match="its weights hold NaN"):
            Scorer.from_pretrained(tmp_path / "tiny", packing=packing)  # type: ignore[arg-type]


def test_rows_that_all_tie_are_said_before_they_are_scored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tie = {"prompt": "3", "completions": [{"rank": 0, "completion": "5"}, {"rank": 0, "completion": "7"}]}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"context": tie["prompt"]} | tie) + "\n" for _ in "ab"))
    monkeypatch.delattr(Scorer, "score_groups")
    with pytest.raises(DataError, match=r"pairs\.jsonl:1\S* on, the responses tie"):
        evaluated(tmp_path, folder / "tiny", tmp_path / "out", "--ties", "keep")
    tiny = str(folder / "tiny")
    with pytest.raises(DataError, match="the responses tie"):
        compare.main([tiny, tiny, "--dataset_name", f"{tmp_path}/pairs.jsonl", "--ties", "keep"])
