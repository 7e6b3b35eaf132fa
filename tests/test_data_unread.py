"""Nothing is ignored silently: columns and fields that are not read, suspicious texts, held-out prompts that are also
trained on, and remedies that fit the file.
"""

import contextlib
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from layout_rows import ASK, MADE, NO, PAIR, USER, YES
from rich.console import Console
from test_bad_rows import accounted, fuzzed
from test_data_check import run
from tiny import tiny_dialog, tiny_pairs

from dwrl_fast.config import TrainConfig, parse_evaluate
from dwrl_fast.data import read_preferences
from dwrl_fast.data.check import check
from dwrl_fast.data.mixture import Part
from dwrl_fast.dialog import Dialog
from dwrl_fast.embedded.templates import EVALUATE, RATE
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.errors import DataError
from dwrl_fast.feed import Shuffled, open_feed, read_rows, warn_of_shared_prompts
from dwrl_fast.feed.feed import Feed
from dwrl_fast.progress import Display
from dwrl_fast.templates import Template
from dwrl_fast.training.dry_run import _read

PLAIN = {"prompt": ASK, **PAIR}
MEANT = ("system", "input", "tools", "images", "label", "winner", "preference", "reasoning_content", "thinking")


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [*MEANT, "tool_calls"])
def test_columns_that_carry_meaning_warn_wherever_they_stand(tmp_path: Path, name: str) -> None:
    rows = [PLAIN, PLAIN | {name: "x", "note": 3}, PLAIN | {name: None}, PLAIN | {name: []}]
    dataset = read_preferences(write(tmp_path, *rows))
    [warning] = dataset.warnings
    assert warning.startswith(f"the column '{name}' is not read, in 1 rows: ")
    assert dataset.unread.columns == {name: 1, "note": 1}
    assert "columns not read: " in dataset.summary and "'note'" in dataset.summary


def test_fields_of_messages_are_counted(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": YES, "reasoning_content": "So.", "weight": 1, "tool_calls": []}
    dataset = read_preferences(write(tmp_path, {"prompt": [USER], "chosen": [answer], "rejected": NO}))
    assert dataset.unread.fields == {"reasoning_content": 1, "weight": 1}
    [warning] = dataset.warnings
    assert warning.startswith("the field 'reasoning_content' is not read, in 1 messages: only `content` is judged")


def test_responses_that_differ_only_in_what_nobody_reads(tmp_path: Path) -> None:
    answers = [[{"role": "assistant", "content": YES, "thinking": text}] for text in ("a", "b")]
    rows = [PLAIN, {"prompt": [USER], "chosen": answers[0], "rejected": answers[1]}]
    assert read_preferences(write(tmp_path, *rows)).dropped == {
        "identical responses: they differ only in 'thinking', which is not read": [2]
    }


def test_texts_that_look_like_something_else(tmp_path: Path) -> None:
    asked = "Q: Why is it?\nA:"
    rows = [
        {"prompt": asked, "chosen": f"{asked} {YES}", "rejected": f"{asked} {NO}"},
        PLAIN | {"chosen": '[{"role": "assistant", "content": "a"}]'},
        PLAIN | {"prompt": "Human: Why?\n\nAssistant:"},
        PLAIN | {"prompt": "Why", "chosen": "Why not.", "rejected": "Why me."},  # too short to be meant
    ]
    dataset = read_preferences(write(tmp_path, *rows), layout="plain")
    assert dataset.notes == {
        "rows whose responses begin with their own prompt": 1,
        "rows with a text that looks like messages written as JSON": 1,
        "rows with a text that looks like a transcript": 1,
    }
    assert len(dataset.warnings) == 3 and all(": " in line for line in dataset.warnings)


def test_it_is_said_by_check_and_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [PLAIN | {"label": 2, "note": "x"}] * 3
    path = write(tmp_path, *rows)
    done = run("--check", path, "--json", tmp_path / "all.json")
    shown = " ".join(done.stdout.split())
    assert (
        "columns not read: 'label', 'note'" in shown and "WARNING: the column 'label' is not read, in 3 rows" in shown
    )
    [found] = json.loads((tmp_path / "all.json").read_text())["files"]
    assert found["unread"] == {"columns": {"label": 3, "note": 3}, "fields": {}}


def test_several_processes_count_what_one_does(tmp_path: Path) -> None:
    rows = [
        PLAIN | {"prompt": f"{i}?", "label": i % 2, "chosen": [{"role": "assistant", "content": YES, "x": 1}]}
        for i in range(400)
    ]
    path = write(tmp_path, *rows)
    one, two = check(path, processes=1), check(path, processes=2, stretch=4000)
    assert one.unread == two.unread and one.unread.columns == {"label": 400} and one.unread.fields == {"x": 400}


def trained(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", output_dir=str(folder), **changes)


def test_training_and_streams_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [json.loads(line) | {"winner": "model_b"} for line in tiny_pairs(tmp_path / "a").read_text().splitlines()]
    path = str(write(tmp_path, *rows))
    for changes in ({}, {"streaming": True, "max_steps": 1}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            open_feed(trained(tmp_path, dataset_name=path, **changes), tiny_dialog(), Display(Console()))
        [said] = [line for line in caplog.messages if "winner" in line]
        assert f"the column 'winner' is not read, in {1 if changes else len(rows)} rows: it usually names" in said


def test_the_layout_is_an_option_of_training(tmp_path: Path) -> None:
    config = trained(tmp_path, dataset_name="x", layout="arena")
    path = write(
        tmp_path, {"prompt": "3", "response_a": "7", "response_b": "9", "winner": "b", "chosen": "7", "rejected": "9"}
    )
    with pytest.raises(DataError, match="in several ways"):
        read_preferences(path)
    rows, _ = read_rows([Part(str(path))], config, tiny_dialog(), Display(Console()))
    assert rows[0].responses == ("9", "7")


def test_labels_are_of_the_aspect_that_the_model_is_asked_about(tmp_path: Path) -> None:
    """Without an option that is the aspect saved with the model, but for the default that nobody named."""
    answers = [
        {"response": "7", "overall_score": 9, "annotations": {"honesty": {"Rating": 1}, "helpfulness": {"Rating": 1}}},
        {"response": "9", "overall_score": 1, "annotations": {"honesty": {"Rating": 2}, "helpfulness": {"Rating": 2}}},
    ]
    path = str(write(tmp_path, {"instruction": "3", "completions": answers}))
    evaluated = parse_evaluate(["--model_name_or_path", "m", "--dataset_name", path])
    streamed = {"dataset_name": path, "streaming": True, "max_steps": 1}
    for saved, part, best in (
        ("honesty", None, "9"),
        (None, None, "7"),
        ("helpfulness", None, "9"),
        (None, "helpfulness", "9"),
        (None, "honesty", "9"),
    ):
        dialog, display = Dialog(make_tokenizer(), Template(EVALUATE, RATE), saved), Display(Console())
        for config in (evaluated, trained(tmp_path, dataset_name=path)):
            assert read_rows([Part(path, aspect=part)], config, dialog, display)[0][0].responses[0] == best
        if part is None:
            feed, _ = open_feed(trained(tmp_path, **streamed), dialog, display)
            assert feed.next()[0].responses[0] == best
            assert _read(Part(path), trained(tmp_path, **streamed), dialog, imitated=False).rows[0].responses[0] == best


def test_held_out_prompts_among_the_training_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = read_preferences(write(tmp_path, *({"prompt": f"{i}?", **PAIR} for i in range(6)))).rows
    feed = Feed([Shuffled("train.jsonl", rows[:4], 0)], [1.0], batch_size=2, epochs=1, max_steps=-1)
    for held_out, said in ((rows[4:], []), (rows[2:], [r"2 of the 4 held-out groups \("]), ([], [])):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_shared_prompts(feed, held_out)
        assert len(caplog.messages) == len(said)
        assert all(line.startswith("2 of the 4 held-out groups (") for line in caplog.messages)


# Cures for the file at hand


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"chosen": "a", "rejected": "a"},
            "--columns chosen=a: the column 'a' is already mapped to 'rejected'; map one",
        ),
        (
            {"prompt": "chosen", "rejected": "a"},
            r"--columns prompt=chosen: 'chosen' is a column of BINARY, the format",
        ),
    ],
)
def test_one_column_in_two_roles_is_refused(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_preferences(write(tmp_path, {"chosen": YES, "a": NO}), columns=columns)


def test_advice_that_would_lose_data_warns(tmp_path: Path) -> None:
    path = write(tmp_path, *MADE["alpaca"].rows)
    assert any("'input'" in line for line in read_preferences(path, columns={"prompt": "instruction"}).warnings)
    path = write(tmp_path, *MADE["label_1_2"].rows[:1])
    columns = {"prompt": "input", "chosen": "output_1", "rejected": "output_2"}
    assert any("'label'" in line for line in read_preferences(path, columns=columns).warnings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "no column 'prompt' .*--layout transcripts"),
        (PLAIN | {"chosen": [{"from": "gpt", "value": YES}]}, "'chosen' .*; --layout sharegpt reads from and value"),
        (PLAIN | {"chosen": {"role": "assistant", "content": YES}}, "'chosen' .*; --layout single_messages reads"),
        (
            PLAIN | {"chosen": [{"role": "assistant", "content": [{"text": YES}]}]},
            "'chosen' .*; --layout content_parts",
        ),
    ],
)
def test_a_row_of_a_layout_among_others_names_it(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path, PLAIN, row)
    with pytest.raises(DataError, match=f":2: {message}"):
        read_preferences(path)
    layout = message.split("--layout ")[1].split(" ")[0]
    rest = row if "prompt" in row else row | {"rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert read_preferences(write(tmp_path, PLAIN, rest), layout=layout).used == 2


def test_booleans_are_grades(tmp_path: Path) -> None:
    rows = [{"prompt": ASK, "completion": text, "score": text == YES} for text in (YES, NO)]
    path = write(tmp_path, *rows)
    with pytest.raises(DataError, match=r"'score' should hold a number, .*; with --columns label="):
        read_preferences(path)
    assert read_preferences(path, columns={"label": "score"}).rows[0].responses == (YES, NO)


def test_ties_of_single_rows_name_the_option(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "completion": text, "score": 1} for prompt in "ab" for text in "xy"]
    with pytest.raises(
        DataError, match=r"4 x no other score for its prompt \(--ties keep would use it\) \(line 1, 2, 3"
    ):
        read_preferences(write(tmp_path, *rows))
    assert read_preferences(write(tmp_path, *rows), ties="keep").used == 4


def test_completions_with_scores_but_no_ranks(tmp_path: Path) -> None:
    row = {"context": ASK, "completions": [{"completion": NO, "score": 1}, {"completion": YES, "score": 3}]}
    [found] = read_preferences(write(tmp_path, row)).rows
    assert (found.responses, found.margin) == ((YES, NO), 2.0)


@pytest.mark.parametrize("name", MADE)
def test_fuzzed_rows_of_layouts_raise_only_our_errors(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    rows = MADE[name].rows
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join([json.dumps(row).encode() for row in rows] + [fuzzed(rows, draw) for _ in range(1500)]))
    used, dropped, errors = accounted(path, layout=name)
    with open(path, "rb") as file:
        assert used | dropped.keys() | errors.keys() == {n for n, line in enumerate(file, start=1) if line.strip()}
    assert all(message.startswith(f"{path}:{line}: ") for line, message in errors.items())
    assert all(len(message) < 1000 and message.isprintable() for message in errors.values())
    for _ in range(60):  # each told from its own first row
        path.write_bytes(fuzzed(rows, draw))
        with contextlib.suppress(DataError):  # an array that cannot be read on
            accounted(path)
