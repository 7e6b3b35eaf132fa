"""Reading pairs: a row is used, or counted with a reason and its line, or an error names file, line and remedy."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dwrl_fast.data import Dataset, read_preferences
from dwrl_fast.errors import DataError

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
ASK = {"role": "user", "content": "Why?"}
YES = {"role": "assistant", "content": "Because."}
NO = {"role": "assistant", "content": "No."}
MORE = {"role": "user", "content": "And?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(folder: Path, *rows: Any, name: str = "pairs.jsonl") -> Path:
    """A file of rows; a string or bytes is written as a raw line."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path = folder / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_one(folder: Path, row: Any, **options: Any) -> Any:
    dataset = read_preferences(write(folder, row), **options)
    assert len(dataset.rows) == 1
    return dataset.rows[0]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (GOOD, [ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": [YES], "rejected": [NO]}, [SYSTEM, ASK]),
        ({"prompt": [ASK], "chosen": "Because.", "rejected": "No."}, [ASK]),
        ({"prompt": "Why?", "chosen": [YES], "rejected": [NO]}, [ASK]),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, [ASK]),
        ({"prompt": "Why?", "chosen": [ASK, YES], "rejected": [ASK, NO]}, [ASK]),
        ({"prompt": "Why?", "chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, ASK, NO]}, [SYSTEM, ASK]),
        ({"prompt": [ASK], "chosen": [YES, MORE, YES], "rejected": [YES, MORE, NO]}, [ASK, YES, MORE]),
        ({"chosen": [ASK, YES, MORE, YES], "rejected": [ASK, YES, MORE, NO]}, [ASK, YES, MORE]),
        ({"prompt": None, "chosen": [ASK, YES], "rejected": [ASK, NO]}, [ASK]),
        ({"prompt": [ASK], "chosen": [YES, ASK, YES], "rejected": [YES, ASK, NO]}, [ASK, YES, ASK]),
        ({"prompt": [MORE], "chosen": [ASK, YES, MORE, YES], "rejected": [ASK, YES, MORE, NO]}, [ASK, YES, MORE]),
    ],
)
def test_forms(tmp_path: Path, row: dict[str, Any], prompt: list[Any]) -> None:
    preference = read_one(tmp_path, row)
    assert preference.prompt == tuple(prompt)
    assert preference.responses == ("Because.", "No.")
    assert (preference.margin, preference.aspect) == (0.0, None)
    assert preference.source == f"{tmp_path / 'pairs.jsonl'}:1"


def test_margin_aspect_and_columns(tmp_path: Path) -> None:
    row = {"question": "Why?", "chosen": "Because.", "rejected": "No.", "delta": 2, "aspect": "brevity", "id": 7}
    preference = read_one(tmp_path, row, columns={"prompt": "question", "margin": "delta"})
    assert (preference.prompt, preference.margin, preference.aspect) == ((ASK,), 2.0, "brevity")


DROPPED: dict[str, list[Any]] = {
    "empty response": [GOOD | {"chosen": " \n"}, GOOD | {"rejected": []}, GOOD | {"chosen": "", "rejected": ""}],
    "identical responses": [GOOD | {"rejected": "Because.\n"}],
    "prompts differ": [
        {"chosen": [ASK, YES], "rejected": [MORE, NO]},
        {"prompt": [ASK], "chosen": [YES, MORE, YES], "rejected": [NO, MORE, YES]},
        {"chosen": [ASK, YES], "rejected": [ASK, YES, MORE, NO]},
    ],
    "empty prompt": [GOOD | {"prompt": ""}, GOOD | {"prompt": []}, GOOD | {"prompt": [SYSTEM]}],
    "empty turn in the prompt": [GOOD | {"prompt": [ASK, YES | {"content": " "}, MORE]}],
    "unknown role 'tool'": [GOOD | {"prompt": [ASK, {"role": "tool", "content": "5"}]}],
    "tool calls": [GOOD | {"chosen": [YES | {"tool_calls": [{"name": "f"}]}]}],
    "null prompt": [GOOD | {"prompt": None}],
    "null chosen": [GOOD | {"chosen": None}],
    "null content": [GOOD | {"rejected": [NO | {"content": None}]}],
    "consecutive turns of one role": [GOOD | {"prompt": [ASK, MORE]}, GOOD | {"prompt": [ASK, YES]}],
    "a system turn inside the conversation": [GOOD | {"prompt": [ASK, SYSTEM]}],
    "the response is not an assistant turn": [GOOD | {"chosen": [MORE]}],
    "margin is not a finite number": [GOOD | {"margin": value} for value in (float("nan"), None, 10**400)],
    "a lone surrogate, which is not valid text": [GOOD | {"chosen": "\ud800"}, GOOD | {"aspect": "\udfff"}],
}


@pytest.mark.parametrize("reason", DROPPED)
def test_rows_without_a_comparison_are_counted_with_their_lines(tmp_path: Path, reason: str) -> None:
    bad = DROPPED[reason]
    dataset = read_preferences(write(tmp_path, GOOD, *bad, GOOD))
    assert len(dataset.rows) == 2
    assert dataset.dropped == {reason: list(range(2, 2 + len(bad)))}
    assert f"{2 + len(bad)} rows read, 2 used, {len(bad)} dropped; {len(bad)} x {reason} (line 2" in dataset.summary


ERRORS: dict[str, tuple[Any, str]] = {
    "malformed": ('{"prompt": "Why?", ', r":2: not JSON \(.* each line must be one object"),
    "no object": ('["Why?"]', ":2: a list where an object was expected"),
    "number without end": (f'{{"margin": {"9" * 5000}}}', ":2: JSON that cannot be read"),
    "too deep": ("[" * 100_000, ":2: JSON that cannot be read"),
    "not UTF-8": ('{"prompt": "Warum? Öl"}'.encode("latin-1"), ":2: not UTF-8 .* convert"),
    "misspelt": (
        {"prompt": "Why?", "choosen": "Because.", "rejected": "No."},
        ":2: no column 'chosen' among 'prompt', 'choosen', 'rejected'; .*--columns chosen=choosen",
    ),
    "missing prompt": ({"chosen": "Because.", "rejected": "No."}, ":2: no column 'prompt' .*--columns prompt=NAME"),
    "missing all": ({}, ":2: no column 'chosen' among none"),
    "number as prompt": (
        GOOD | {"prompt": 5},
        ":2: 'prompt' should hold a string or a list of messages, not the int 5",
    ),
    "strings as messages": (GOOD | {"chosen": ["Because."]}, ":2: 'chosen' should hold messages with 'role'"),
    "foreign keys": (GOOD | {"chosen": [{"from": "gpt", "value": "Because."}]}, ":2: 'chosen' .*'role' and 'content'"),
    "content parts": (GOOD | {"chosen": [YES | {"content": [{"text": "a"}]}]}, ":2: 'chosen' .*content are strings"),
    "margin of text": (GOOD | {"margin": "2"}, ":2: 'margin' should hold a number, not the str '2'"),
    "margin of truth": (GOOD | {"margin": True}, ":2: 'margin' should hold a number"),
    "aspect of number": (GOOD | {"aspect": 3}, ":2: 'aspect' should hold a string"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_rows_not_of_the_form_are_errors(tmp_path: Path, kind: str) -> None:
    row, message = ERRORS[kind]
    with pytest.raises(DataError, match=f"pairs.jsonl{message}"):
        read_preferences(write(tmp_path, GOOD, row))


def test_named_columns_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: no column 'delta' among .*--columns margin=NAME"):
        read_preferences(write(tmp_path, GOOD), columns={"margin": "delta"})
    with pytest.raises(DataError, match="there is no column 'choosen' to fill; did you mean 'chosen'"):
        read_preferences(write(tmp_path, GOOD), columns={"choosen": "chosen"})


def test_nothing_left_is_an_error_that_accounts_for_the_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable row: .* 2 rows read, 0 used, 2 dropped; 2 x identical responses"):
        read_preferences(write(tmp_path, *[GOOD | {"rejected": "Because."}] * 2))
    with pytest.raises(DataError, match=r"no usable row: .* 0 rows read"):
        read_preferences(write(tmp_path, ""))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.jsonl: cannot be read \(No such file"):
        read_preferences(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_preferences(tmp_path)


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    strange = "one\u2028two\u2029three\u0085four\x0bfive\x0csix\rseven"
    row = json.dumps(GOOD | {"chosen": strange}, ensure_ascii=False).encode()
    dataset = read_preferences(write(tmp_path, b"\xef\xbb\xbf" + row + b"\r", b"", b"  ", GOOD))
    assert [row.responses[0] for row in dataset.rows] == [strange, "Because."]
    assert [row.source.rpartition(":")[2] for row in dataset.rows] == ["1", "4"]


def test_limit_counts_usable_rows_and_reads_no_further(tmp_path: Path) -> None:
    dataset = read_preferences(write(tmp_path, GOOD | {"chosen": ""}, GOOD, GOOD, "{"), limit=2)
    assert (len(dataset.rows), dataset.dropped) == (2, {"empty response": [1]})


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.jsonl"])
def test_gzip_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert len(read_preferences(path).rows) == 1
    plain = write(tmp_path, GOOD, name="plain.jsonl.gz")
    assert len(read_preferences(plain).rows) == 1


def test_damaged_gzip(tmp_path: Path) -> None:
    rows = [GOOD | {"id": i, "chosen": f"{i * 7919 % 1013} because."} for i in range(2000)]
    whole = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    no_block = whole[:10] + b"\xff" + whole[11:]
    wrong_sum = whole[:-8] + bytes(8)
    for content in (whole[: len(whole) // 2], no_block, wrong_sum, whole + b"junk"):
        path = tmp_path / "damaged.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=r"damaged.jsonl.gz:\d+: the gzip file is cut off or damaged .* fetch it again"
        ):
            read_preferences(path)


def test_summary_shows_a_few_lines_a_reason() -> None:
    dataset = Dataset("f")
    for line in range(1, 6):
        dataset.dropped["a"].append(line)
    dataset.dropped["b"].append(9)
    assert sum(map(len, dataset.dropped.values())) == 6
    assert dataset.summary == "f: 6 rows read, 0 used, 6 dropped; 5 x a (line 1, 2, 3, ...); 1 x b (line 9)"


COUNTS = {
    "hh/hh_train": 3632,
    "hh/hh_test": 1000,
    "math/gsm8k_real_train": 4895,
    "math/gsm8k_real_test": 802,
    "math/gsm8k_corrupt_train": 5000,
    "math/gsm8k_corrupt_test": 800,
    "rmb/rmb_helpful_train": 5395,
    "rmb/rmb_helpful_test": 801,
    "if/llmbar": 419,
    "if/ultrafeedback_train": 994,
    "if/ultrafeedback_test": 199,
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_have_the_counts_of_their_description(shared: Path, name: str) -> None:
    dataset = read_preferences(shared / f"{name}.jsonl.gz")
    assert len(dataset.rows) == COUNTS[name]
    assert not dataset.dropped


def test_real_bad_rows_that_are_pairs(shared: Path, tmp_path: Path) -> None:
    with gzip.open(shared / "edge/real_bad_rows.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
        found = [json.loads(line) for line in file]
    found = [row for row in found if row["source"].startswith("ultrafeedback")]
    dataset = read_preferences(write(tmp_path, *(row["raw"] for row in found)))
    expected = {
        reason: [i for i, row in enumerate(found, start=1) if row["reasons"] == [reason]]
        for reason in ("identical responses", "empty response")
    }
    assert dataset.dropped == expected
    assert len(dataset.rows) + sum(map(len, dataset.dropped.values())) == len(found) == 14
