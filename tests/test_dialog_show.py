"""`python -m dwrl_fast.dialog --show`: its output for real rows, and its errors."""

import functools
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from chats import contents_of
from rich.console import Console

from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.dialog.__main__ import SAMPLE, ShowConfig, read_row, run
from dwrl_fast.errors import ConfigError, DataError, TemplateError, UserError
from dwrl_fast.models.pretrained import load_tokenizer
from dwrl_fast.options import help_page, parse

load_once = functools.cache(load_tokenizer)


@pytest.fixture(autouse=True)
def one_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwrl_fast.dialog.chat.ContentTokenizer", contents_of)
    monkeypatch.setattr("dwrl_fast.models.pretrained.load_tokenizer", load_once)


ROWS = [
    {"prompt": "What is five plus one?", "chosen": " Six. ", "rejected": "Se\u001bven<|im_end|>"},
    {"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."},
]


def shown(folder: Path, tokenizer: Path, *argv: str, line: int = 1) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return printed("--show", f"{path}:{line}", *argv, tokenizer=tokenizer)


def printed(*argv: str, tokenizer: Path) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    run(parse(ShowConfig, [*argv, "--tokenizer_name_or_path", str(tokenizer)]), console)
    return console.export_text()


def test_the_dialog_of_a_row(shared: Path, tmp_path: Path) -> None:
    text = shown(tmp_path, shared / "tokenizers" / "llama3", "--aspect", "tact")
    assert "<|begin_of_text|><|start_header_id|>system" in text and "with regard to tact" in text
    assert "128000 128006" in text
    assert "trimmed: the chat template strips" in text and "fixed at 26 Jul 2024" in text
    assert "BOS: 1 of id 128000" in text
    rows = [line.split() for line in text.splitlines() if line.split()[:1] == ["response"]]
    assert [int(rows[-1][2]) - int(rows[-1][1]) + 1] == [int(rows[-1][3])] == [2]


def test_the_other_response_and_an_over_long_row(shared: Path, tmp_path: Path) -> None:
    text = shown(tmp_path, shared / "tokenizers" / "qwen2.5", "--response", "2", "--max_length", "10")
    assert "Se\ufffdven<|im_end|>" in text and "\u001b" not in text, "a terminal would obey it"
    assert "control text: a text spells a control token" in text
    assert "more than --max_length 10: training drops this row" in text


@pytest.mark.parametrize("kind", ["pairwise", "pointwise", "direct", "rationalizer"])
def test_the_other_kinds(shared: Path, tmp_path: Path, kind: str) -> None:
    text = shown(tmp_path, shared / "tokenizers" / "qwen2.5", "--template", kind)
    spans = [line.split()[0] for line in text.partition("what was done")[0].splitlines() if line[-4:].strip().isdigit()]
    assert ("Se\ufffdven" in text) == (kind != "pointwise")
    assert ("thought (a sample)" in text) == (kind != "direct")
    assert "head" in spans


def test_rows_that_are_not_there(shared: Path, tmp_path: Path) -> None:
    tokenizer = shared / "tokenizers" / "qwen2.5"
    with pytest.raises(DataError, match="holds no usable row: identical responses"):
        shown(tmp_path, tokenizer, line=2)
    with pytest.raises(DataError, match="there is no row on that line"):
        shown(tmp_path, tokenizer, line=9)
    with pytest.raises(ConfigError, match="the row has 2"):
        shown(tmp_path, tokenizer, "--response", "3")
    for argv, message in (
        (["--show", "rows.jsonl"], "expected FILE:N"),
        (["--show", "rows.jsonl:1"], "give --model_name_or_path or"),
        ([], "--show is missing"),
    ):
        argv += ["--tokenizer_name_or_path", "x"] if "give" not in message else []
        with pytest.raises(UserError, match=message):
            parse(ShowConfig, argv)


def test_the_examples_of_the_help_page_parse() -> None:
    _, _, examples = help_page(ShowConfig, 100).partition("\nExamples")
    lines = [line.split()[3:] for line in examples.splitlines() if line.strip().startswith("python -m")]
    found = [parse(ShowConfig, argv) for argv in lines]
    assert [config.template for config in found] == [None, None, "pairwise", "mine.yaml"]
    assert [config.response for config in found] == [1, 2, 1, 1]


ASKED, GOOD, BAD, FINE = "What is five plus one?", "Six.", "Seven.", "It is six."
TURN = {"role": "user", "content": ASKED}
SINGLE: list[dict[str, Any]] = [
    {"prompt": ASKED, "completion": text, "score": score} for text, score in ((BAD, 1), (GOOD, 5), (FINE, 5))
]
JUDGED = {"prompt": ASKED, "thought": "Five and one make six."}
FORMATS: dict[str, tuple[list[dict[str, Any]], list[list[str]]]] = {  # rows, and the responses of each, best first
    "BINARY": ([{"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "margin": 0.5}], [[GOOD, BAD]]),
    "the prompt inside both": (
        [
            {
                "chosen": [TURN, {"role": "assistant", "content": GOOD}],
                "rejected": [TURN, {"role": "assistant", "content": BAD}],
            },
        ],
        [[GOOD, BAD]],
    ),
    "BINARYMAGN": (
        [{"prompt": ASKED, "chosen": GOOD, "rejected": text, "magnitude": m} for text, m in ((BAD, 2), (FINE, 0))],
        [[GOOD, BAD], [GOOD, FINE]],
    ),
    "RANKING of two": ([{"prompt": ASKED, "responses": [BAD, GOOD], "ranks": [2, 1]}], [[GOOD, BAD]]),
    "scores of two": ([{"prompt": ASKED, "responses": [BAD, GOOD], "scores": [1.0, 8.5]}], [[GOOD, BAD]]),
    "three, two tie": (
        [{"prompt": ASKED, "responses": [BAD, GOOD, FINE], "ranks": [3, 1, 1], "scores": [1.0, 8.5, 8.0]}],
        [[GOOD, FINE, BAD]],
    ),
    "best of n": ([{"prompt": ASKED, "responses": [BAD, GOOD, "Two."], "ranks": [2, 1, 2]}], [[GOOD, BAD, "Two."]]),
    "all tie": ([{"prompt": ASKED, "responses": [GOOD, FINE], "ranks": [1, 1]}], [[GOOD, FINE]]),
    "one twice": ([{"prompt": ASKED, "responses": [BAD, GOOD, BAD], "scores": [1, 2, 1]}], [[GOOD, BAD]]),
    "nine, some tie": (
        [{"prompt": ASKED, "responses": [*"abcdefghi"], "scores": [0, 5, 5, 3, 2, 9, 1, 1, 1]}],
        [["f", "b", "c", "d", "e", "g", "h", "i", "a"]],
    ),
    "context and completions": (
        [{"context": ASKED, "completions": [{"rank": 1, "completion": BAD}, {"rank": 0, "completion": GOOD}]}],
        [[GOOD, BAD]],
    ),
    "SINGLE": (SINGLE, [[BAD], [GOOD], [FINE]]),
    "DEMONSTRATION": ([{**JUDGED, "response": BAD, "verdict": "No"}], [[BAD]]),
}


def file_of(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if kind == "jsonl.gz" else text)
    return path


def read(where: str) -> Preference:
    return read_row(parse(ShowConfig, ["--show", where, "--tokenizer_name_or_path", "t"]), None)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_row_of_every_format(shared: Path, tmp_path: Path, form: str, kind: str) -> None:
    rows, expected = FORMATS[form]
    path = file_of(tmp_path, kind, rows)
    for line, responses in enumerate(expected, start=1):
        assert read(f"{path}:{line}").responses == tuple(responses)
        for k, response in enumerate(responses, start=1):
            text = printed(
                "--show", f"{path}:{line}", "--response", str(k), tokenizer=shared / "tokenizers" / "qwen2.5"
            )
            assert f"user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>" in text
    if form == "DEMONSTRATION":
        assert JUDGED["thought"] in text and "verdict No" in text and SAMPLE not in text
    else:
        assert SAMPLE in text


def test_a_demonstration_of_each_kind_of_template(shared: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**JUDGED, "responses": [BAD, GOOD], "verdict": "B"},
        {**JUDGED, "responses": [BAD, GOOD], "verdict": "B", "thought": ""},
        {**JUDGED, "response": BAD, "verdict": 2},
    ]
    path = file_of(tmp_path, "jsonl", rows)
    for line, kind, end in ((1, "pairwise", "<answer>[[B]]</answer>"), (2, "direct", ""), (3, "pointwise", "<s>2</s>")):
        asked = "--show", f"{path}:{line}", "--template", kind
        text = printed(*asked, tokenizer=shared / "tokenizers" / "qwen2.5")
        assert BAD in text and (GOOD in text) == (kind != "pointwise") and SAMPLE not in text
        assert kind == "direct" or f"{JUDGED['thought']}\n{end}<|im_end|>" in text
    with pytest.raises(TemplateError, match="not 1 responses, the number that a template of kind dialog shows"):
        printed("--show", f"{path}:1", tokenizer=shared / "tokenizers" / "qwen2.5")


@pytest.mark.parametrize("line", [2, 3, 4])
def test_other_lines_do_not_matter(tmp_path: Path, line: int) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps(row) for row in SINGLE]
    path.write_text(
        "\n".join(['{"prompt": 1, "x":', *rows, '{"prompt": "p", "chosen": 5, "rejected": "q"}', "[", "\x00"])
    )
    assert read(f"{path}:{line}").responses == (SINGLE[line - 2]["completion"],)
    with pytest.raises(DataError, match=r"rows.jsonl:1: not JSON"):
        read(f"{path}:1")
    with pytest.raises(DataError, match=r"rows.jsonl:5: 'chosen' should hold a string"):
        read(f"{path}:5")


def test_a_file_that_is_cut_off_behind_the_line(tmp_path: Path) -> None:
    whole = file_of(tmp_path, "jsonl.gz", SINGLE + [{"n": hashlib.sha256(bytes([i])).hexdigest()} for i in range(250)])
    whole.write_bytes(whole.read_bytes()[:-4000])
    assert read(f"{whole}:2").responses == (GOOD,)
    with pytest.raises(DataError, match="the gzip file is cut off or damaged here"):
        read(f"{whole}:250")


def test_two_responses_of_a_row_that_holds_one(shared: Path, tmp_path: Path) -> None:
    path, tokenizer = file_of(tmp_path, "jsonl", SINGLE), shared / "tokenizers" / "qwen2.5"
    with pytest.raises(
        ConfigError, match=r"kind pairwise shows two responses, but the row has one; .*--template dialog"
    ):
        printed("--show", f"{path}:1", "--template", "pairwise", tokenizer=tokenizer)
    assert BAD in printed("--show", f"{path}:1", "--template", "dialog", tokenizer=tokenizer)


@pytest.mark.parametrize(
    "name", ["arena_bench_likert15", "arena_bench_rank7", "qa_feedback_rank4", "rmb_bon_helpful", "webgpt_magnitude"]
)
def test_real_rows_are_those_that_training_reads(shared: Path, name: str) -> None:
    path = shared / "graded" / f"{name}.jsonl.gz"
    rows = read_preferences(path, ties="keep", limit=1500).rows
    for line in range(1, 9):
        trained = [row for row in rows if row.lines == (line,)]
        if trained:
            found = read(f"{path}:{line}")
            assert found.prompt == trained[0].prompt
            assert set(found.responses) == {text for row in trained for text in row.responses}
            assert all(
                found.responses.index(a) < found.responses.index(b) for a, b in (row.responses for row in trained)
            )
        else:
            with pytest.raises(DataError, match=rf":{line} holds no usable row"):
                read(f"{path}:{line}")
