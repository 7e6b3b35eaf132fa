"""`Scorer.as_reward_function`: for any rows of a trainer, rows that can be judged get their own score, and no row fails
the batch.
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeSampler
from judging import A, saved_model
from transformers import AutoModelForCausalLM

from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.errors import DataError, ModelError, UserError
from dwrl_fast.log import logger
from dwrl_fast.scoring.scorer import Scorer

Row = tuple[Any, Any]  # prompt and completion


def scorer_of(module_folder: Path, name: str) -> Scorer:
    return Scorer.from_pretrained(saved_model(module_folder, name), dtype="fp32")


def says(scorer: Scorer, said: Callable[[str, int], str]) -> None:
    runtime: Any = scorer._judging.runtime
    object.__setattr__(runtime, "sampler", FakeSampler(runtime.dialog, said))


def rewards(scorer: Scorer, rows: list[Row], columns: dict[str, Any] | None = None, **options: Any) -> Any:
    prompts, completions = [row[0] for row in rows], [row[1] for row in rows]
    function = scorer.as_reward_function(**options)
    return asyncio.run(function(prompts=prompts, completions=completions, completion_ids=[], **(columns or {})))


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(text: Any) -> dict[str, Any]:
    return turn("user", text)


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return turn("assistant", text, **more)


def several(text: str) -> list[dict[str, Any]]:
    return [user(text), assistant("5"), user("1")]


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


IMAGE = {"type": "image", "image": object()}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def called(text: str) -> list[dict[str, Any]]:
    return [assistant(None, tool_calls=[CALL]), turn("tool", "7"), assistant(text)]


# Forms of a prompt p and a response r: a row that can be judged, and a simple row that means the same.
PARTS, LONG = "a content part that is not text", "with its thought it has more tokens than the model has positions"
GOOD: dict[str, Callable[[str, str], tuple[Row, Row]]] = {
    "texts": lambda p, r: ((p, r), (p, r)),
    "messages and a text": lambda p, r: (([user(p)], r), (p, r)),
    "a text and a turn": lambda p, r: ((p, [assistant(r)]), (p, r)),
    "messages": lambda p, r: (([user(p)], [assistant(r)]), (p, r)),
    "tuples": lambda p, r: (((user(p),), (assistant(r),)), (p, r)),
    "columns of datasets": lambda p, r: (([turn("user", p, tool_calls=None)], [assistant(r, tool_calls=[])]), (p, r)),
    "parts in the prompt": lambda p, r: (([user(parts(p))], r), (p, r)),
    "parts in the completion": lambda p, r: (([user(p)], [assistant(parts(r))]), (p, r)),
    "several parts": lambda p, r: (([user(parts(p[:2], p[2:]))], [assistant(parts(r[:1], r[1:]))]), (p, r)),
    "prefilled": lambda p, r: (([user(p), assistant(r[:1])], [assistant(r[1:])]), (p, r)),
    "prefilled in parts": lambda p, r: (([user(parts(p)), assistant(parts(r[:1]))], r[1:]), (p, r)),
    "prefilled with nothing": lambda p, r: (([user(p), assistant("")], r), (p, r)),
    "an empty completion": lambda p, r: ((p, ""), (p, "")),
    "several turns": lambda p, r: ((several(p), [assistant(r)]), (several(p), r)),
    "a control token": lambda p, r: ((p, f"{r} <|end|>"), (p, f"{r} <|end|>")),
}  # fmt: skip
# Rows that cannot be judged, and the reasons.
BAD: dict[str, tuple[Callable[[str, str], Row], str]] = {
    "no prompt": (lambda p, r: (None, r), "not in the expected form"),
    "an empty prompt": (lambda p, r: ("", r), "empty prompt"),
    "a blank prompt": (lambda p, r: ([user("  ")], r), "empty prompt"),
    "no turns": (lambda p, r: ([], r), "empty prompt"),
    "a system turn alone": (lambda p, r: ([turn("system", p)], r), "empty prompt"),
    "an answer to nothing": (lambda p, r: ([assistant(p)], r), "empty prompt"),
    "a number": (lambda p, r: (7, r), "not in the expected form"),
    "a message by itself": (lambda p, r: (user(p), r), "not in the expected form"),
    "two turns of one role": (lambda p, r: ([user(p), user(p)], r), "consecutive turns of one role"),
    "a system turn inside": (lambda p, r: ([user(p), turn("system", p), user(p)], r), "a system turn inside the conv"),
    "what the template refuses": (lambda p, r: ([turn("system", p), user(p)], r), "only user and assistant"),
    "a tool's turn": (lambda p, r: ([user(p), assistant(""), turn("tool", "7")], r), "unknown role 'tool'"),
    "a call in the prompt": (lambda p, r: ([user(p), assistant(None, tool_calls=[CALL]), user(p)], r), "tool calls"),
    "no role": (lambda p, r: ([{"content": p}], r), "not in the expected form"),
    "no content": (lambda p, r: ([{"role": "user"}], r), "not in the expected form"),
    "null content": (lambda p, r: ([user(None)], r), "null content"),
    "a list in a list": (lambda p, r: ([[user(p)]], r), "not in the expected form"),
    "an image": (lambda p, r: ([user([IMAGE, *parts(p)])], r), PARTS),
    "a part without text": (lambda p, r: ([user([{"type": "text"}])], r), PARTS),
    "a surrogate in the prompt": (lambda p, r: ("\ud800", r), "a lone surrogate, which is not valid text"),
    "an over-long prompt": (lambda p, r: ("5 " * 3000, r), LONG),
    "no completion": (lambda p, r: (p, None), "not in the expected form"),
    "no turns written": (lambda p, r: (p, []), "not one assistant turn"),
    "a call": (lambda p, r: ([user(p)], [assistant("", tool_calls=[CALL])]), "tool calls"),
    "a call and its answer": (lambda p, r: ([user(p)], called(r)), "tool calls"),
    "two turns": (lambda p, r: ([user(p)], [assistant(r), assistant(r)]), "not one assistant turn"),
    "the user's turn": (lambda p, r: ([user(p)], [user(r)]), "not one assistant turn"),
    "nothing in the turn": (lambda p, r: ([user(p)], [assistant(None)]), "null content"),
    "an image as the answer": (lambda p, r: ([user(p)], [assistant([IMAGE])]), PARTS),
    "a number as the answer": (lambda p, r: (p, 5.0), "not in the expected form"),
    "bytes": (lambda p, r: (p, r.encode()), "not in the expected form"),
    "a message as the answer": (lambda p, r: (p, assistant(r)), "not in the expected form"),
    "a surrogate": (lambda p, r: (p, [assistant("5 \udfff")]), "a lone surrogate, which is not valid text"),
    "an over-long answer": (lambda p, r: (p, "5 " * 3000), LONG),
}  # fmt: skip
PROMPTS, RESPONSES = ["3 5 0", "5 6 2 1", "1 1"], ["5", "2 7 1", "8 8", "1 1 1 0 4"]


@pytest.mark.parametrize("name", ["dwrl", "bt", "sft", "grpo-point", "gram"])
def test_any_mixture_of_rows(module_folder: Path, name: str) -> None:
    """Each good row has the same score as alone, and each bad row has None, in any mixture."""
    scorer, dice = scorer_of(module_folder, name), random.Random(name)
    if name == "grpo-point":
        says(scorer, lambda text, i: f"<s> {len(text) % 10} </s>")
    kinds = [*GOOD, *BAD]
    if name in ("grpo-point", "gram"):
        kinds.remove("what the template refuses")  # these methods show the conversation in one user turn
    for _ in range(6):
        rows: list[Row] = []
        expected: list[float | None] = []
        before = scorer.unjudged.total()
        for kind in dice.choices(kinds, k=16):
            p, r = dice.choice(PROMPTS), dice.choice(RESPONSES)
            if kind in GOOD:
                row, (prompt, response) = GOOD[kind](p, r)
                begun = r[:1] if scorer.compares and kind.startswith("prefilled") and "nothing" not in kind else ""
                other = [f"{begun}7"] if scorer.compares else None  # it also continues the prefilled text
                expected.append(scorer.score([prompt], [response], reference=other).item())
            else:
                row = BAD[kind][0](p, r)
                expected.append(None)
            rows.append(row)
        found = rewards(scorer, rows, {"reference": ["7"] * len(rows)} if scorer.compares else {})
        assert [value is None for value in found] == [value is None for value in expected]
        assert found == [value and pytest.approx(value, abs=1e-5) for value in expected]
        assert scorer.unjudged.total() == before + expected.count(None)


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_judged_is_counted_and_the_first_is_said(
    module_folder: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(module_folder, "dwrl")
    monkeypatch.setattr(logger, "propagate", True)
    row, reason = BAD[kind]
    with caplog.at_level(logging.WARNING, "dwrl_fast"):
        function = scorer.as_reward_function()
        for _ in range(2):
            rows = [("3 5 0", "5"), row("3 5 0", "5"), (None, "5"), ("3 5 0", "5")]
            found = asyncio.run(function(prompts=[p for p, _ in rows], completions=[c for _, c in rows]))
            assert [value is None for value in found] == [False, True, True, False]
    assert scorer.unjudged.total() == 4
    assert sum(count for why, count in scorer.unjudged.items() if reason in why) >= 2
    (said,) = [record.getMessage() for record in caplog.records if "gets no reward" in record.getMessage()]
    assert said.startswith("completion 1 of a batch gets no reward (None): ") and "Scorer.unjudged" in said


def test_programming_errors_end_the_batch(module_folder: Path) -> None:
    scorer, gram, judge = (scorer_of(module_folder, name) for name in ("dwrl", "gram", "judge"))
    good = ("3 5 0", "5")
    call = scorer.as_reward_function()
    with pytest.raises(DataError, match="1 prompts for 2 completions"):
        asyncio.run(call(prompts=["3"], completions=["5", "5"]))
    with pytest.raises(DataError, match="prompts should be a list"):
        asyncio.run(call(prompts="3", completions=["5"]))
    with pytest.raises(DataError, match="no column 'reference'"):
        rewards(gram, [good])
    with pytest.raises(DataError, match="1 references for 2 completions"):
        rewards(gram, [good, good], {"reference": ["7"]})
    with pytest.raises(DataError, match="the reference of completion 1 is not text but the int 4"):
        rewards(gram, [good, good], {"answer": ["7", 4]}, reference="answer")
    with pytest.raises(ModelError, match=r"infinite log-odds where all agree.*probability=True"):
        rewards(judge, [good], {"reference": ["7"]})
    assert rewards(scorer, []) == [] and not scorer.unjudged and not gram.unjudged


def test_references_and_verdicts_that_cannot_be_read(module_folder: Path) -> None:
    scorer = scorer_of(module_folder, "judge")
    object.__setattr__(
        scorer._judging.runtime, "sampler", FakeSampler(scorer.dialog, lambda text, i: "ok" if "8" in text else A)
    )
    rows = [("1", "5"), ("1", "4"), ("1", "8"), ("1", None)]
    found = rewards(scorer, rows, {"reference": ["2", None, "3", "4"]}, probability=True)
    assert found == [0.5, None, None, None]
    assert scorer.unjudged == {"not in the expected form": 2, "a verdict that cannot be read": 1}
    same = [("1", [assistant("5")]), ("1", "5")]
    assert rewards(scorer, same, {"reference": [[assistant(parts("2"))], "2"]}, probability=True) == [0.5, 0.5]


def test_an_infinite_log_odds_of_one_row(module_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of(module_folder, "gram")
    whole = scorer.score(["1", "1"], ["5", "4"], reference=["2", "2"])
    monkeypatch.setattr(Scorer, "score", lambda *_, **__: torch.tensor([whole[0], math.inf]))
    assert rewards(scorer, [("1", "5"), ("1", "4")], {"reference": ["2", "2"]}) == [whole[0].item(), None]
    assert [*scorer.unjudged] == [
        "infinite log-odds, which cannot be a reward: use as_reward_function(probability=True)"
    ]


@pytest.mark.parametrize("kind", GOOD)
def test_scores_read_prompts_and_responses_in_the_same_way(module_folder: Path, kind: str) -> None:
    scorer = scorer_of(module_folder, "dwrl")
    (prompt, response), (p, r) = GOOD[kind]("3 5 0", "2 7 1")
    assert scorer.score([prompt], [response]).tolist() == scorer.score([p], [r]).tolist()
    begun = "2" if "prefilled" in kind and "nothing" not in kind else ""
    assert scorer.rank(prompt, ["5", response]) == scorer.rank(p, [f"{begun}5", r])
    assert scorer.compare(prompt, response, "5") == scorer.compare(p, r, f"{begun}5")


@pytest.mark.parametrize("kind", BAD)
def test_scores_of_what_cannot_be_judged_are_refused(module_folder: Path, kind: str) -> None:
    prompt, response = BAD[kind][0]("3 5 0", "2 7 1")
    if "over-long" in kind:
        return
    with pytest.raises(UserError):
        scorer_of(module_folder, "dwrl").score(["3 5 0", prompt], ["5", response])


@pytest.mark.slow
def test_a_step_of_trls_grpo_trainer_with_rows_of_all_kinds(module_folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    scorer = scorer_of(module_folder, "dwrl")
    inner = scorer.as_reward_function()
    seen: list[Any] = []

    async def mixed(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        """The trainer's rows, except that two of four are replaced: by a tool call and by an image."""
        prompts, completions = [*prompts], [*completions]
        completions[1] = called("5")
        prompts[2] = [user([IMAGE, *parts("3")])]
        seen.extend(await inner(prompts=prompts, completions=completions, **columns))
        return seen[-len(prompts) :]

    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(module_folder / "tiny"),
        processing_class=make_tokenizer(),
        reward_funcs=mixed,
        train_dataset=Dataset.from_list([{"prompt": [user("3 5 0")], "other": i} for i in range(4)]),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    assert [value is None for value in seen] == [False, True, True, False]
    assert [*scorer.unjudged.values()] == [1, 1]
    reward = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert reward == pytest.approx([(seen[0] + seen[3]) / 2])
