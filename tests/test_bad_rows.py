"""Bad input gives an error that names file, line and remedy, or a counted reason, and never another exception."""

import builtins
import gzip
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bad_rows
import pytest
from bad_rows import COMPLETIONS, FILES, KINDS, MAGNITUDE, PAIR, RANKS, SCORES, SINGLES, SPACES, Bad

from dwrl_fast.data import Preference, Reader, open_rows, read_preferences
from dwrl_fast.dialog import Dialog
from dwrl_fast.encode import drop_long
from dwrl_fast.errors import DataError


def check_whole(row: Preference) -> None:
    """Assert the properties of a row that later code relies on."""
    assert [turn["role"] for turn in row.prompt if turn["role"] != "system"][-1] == "user"
    assert len(row.responses) > 1
    for text in (*row.responses, *(turn["content"] for turn in row.prompt)):
        assert text.encode().strip()
    assert len({text.strip() for text in row.responses}) == len(row.responses)
    assert math.isfinite(row.margin)
    assert row.ranks == () or (len(row.ranks) == len(row.responses) and row.ranks[0] == 1)
    assert list(row.ranks) == sorted(row.ranks)
    assert all(type(rank) is int for rank in row.ranks)


def accounted(path: Path, **options: Any) -> tuple[set[int], dict[int, str], dict[int, str]]:
    """The used, dropped and erroneous lines, from a reader that continues after errors; the three are disjoint."""
    used: set[int] = set()
    dropped: dict[int, str] = {}
    errors: dict[int, str] = {}
    reader = Reader(open_rows(path), **options)
    for outcome in reader.read():
        for row in outcome.preferences:
            check_whole(row)
        used |= {line for row in outcome.preferences for line in row.lines}
        assert not any(line in dropped for _, line in outcome.dropped)
        dropped |= {line: reason for reason, line in outcome.dropped}
        if outcome.error is not None:
            assert type(outcome.error) is DataError
            errors[outcome.after.line] = str(outcome.error)
    assert not (used & dropped.keys() or used & errors.keys() or dropped.keys() & errors.keys())
    return used, dropped, errors


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_line_among_good_ones(tmp_path: Path, kind: str) -> None:
    bad: Bad = KINDS[kind]
    path = tmp_path / "data.jsonl"
    path.write_bytes(bad.content)
    used, dropped, errors = accounted(path)
    lines = {*range(1, bad.content.count(b"\n") + 1)}
    if bad.error:
        where = re.escape(f"{path}:{bad.number}: ")
        with pytest.raises(DataError, match=f"^{where}{bad.error}"):
            read_preferences(path)
        assert re.match(where + bad.error, errors[bad.number])
        assert "; " in errors[bad.number] or "should hold" in errors[bad.number]  # a remedy
        assert (used, dropped) == (lines - errors.keys(), {})
        assert all(bad.number <= line <= len(lines) - len(bad.among) for line in errors)
        return
    dataset = read_preferences(path)
    if bad.dropped:
        assert dataset.dropped == {bad.dropped: [bad.number]}
        assert (used, dropped, errors) == (lines - {bad.number}, {bad.number: bad.dropped}, {})
        assert f"1 x {bad.dropped} (line {bad.number})" in dataset.summary
    else:
        [first, *_] = [row for row in dataset.rows if bad.number in row.lines]
        assert first.responses[0] == bad.used
        assert (used, dropped, errors) == (lines, {}, {})
    assert dataset.used + sum(map(len, dataset.dropped.values())) == len(lines)


def test_the_corpus_is_as_large_as_it_should_be() -> None:
    assert len(KINDS) + len(FILES) >= 60
    assert all(sum(map(bool, (bad.error, bad.dropped, bad.used))) == 1 for bad in KINDS.values())


@pytest.mark.parametrize("kind", FILES)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    content, message = FILES[kind]
    path = tmp_path / "data"
    path.write_bytes(content)
    expected = message if message.startswith("no usable row") else re.escape(str(path)) + message
    with pytest.raises(DataError, match=f"^{expected}"):
        read_preferences(path)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reason in (
        (tmp_path / "absent.jsonl", "No such file"),
        (tmp_path / f"{'x' * 5000}.jsonl", "File name too long"),
        (tmp_path / "a\0b.jsonl", "embedded null byte"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(DataError, match=rf"cannot be read.*{reason}.*; (check the path|name a file)"):
            read_preferences(name)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(PAIR))
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        with pytest.raises(DataError, match=r"data.jsonl: cannot be read \(Permission denied\); check .* permissions"):
            read_preferences(path)


@pytest.mark.slow
def test_a_line_of_100_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(PAIR)
    path.write_text("\n".join([good, json.dumps(PAIR | {"chosen": "x " * 50_000_000}), "y" * 100_000_000, good]))
    used, dropped, errors = accounted(path)
    assert (used, dropped, list(errors)) == ({1, 2, 4}, {}, [3])
    assert len(errors[3]) < 300


# Length


class Words(Dialog):
    """A dialog in which every word is a token."""

    def __init__(self) -> None:
        """Without template or tokenizer."""

    def context(self, prompt: Any, response: str, aspect: str | None = None) -> Any:
        count = sum(len(turn["content"].split()) for turn in prompt) + len(response.split())
        return SimpleNamespace(response=slice(0, count), second=None, ids=[0] * count)

    def sequence(self, context: Any, thought: Any) -> Any:
        return SimpleNamespace(ids=[*context.ids, 0])


def test_rows_that_are_too_long_are_dropped_whole_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    long = RANKS | {"responses": ["a", "b " * 20, "c"]}
    row = {"prompt": "Why?", "responses": [SPACES, "No."], "ranks": [1, 2]}
    path.write_text("\n".join(map(json.dumps, (RANKS, long, RANKS | {"prompt": "why " * 20}, row))))
    for rankings, left, notes in (
        ("pairs", 5, {"groups left out: longer than --max_length 10 tokens": 2}),
        ("plackett_luce", 2, {}),
    ):
        dataset = read_preferences(path, rankings=rankings)  # type: ignore[arg-type]
        steps: list[int] = []
        assert drop_long(dataset, Words(), 10, steps.append) == 4
        assert len(dataset.rows) == left
        assert dataset.rows[-1].responses[0] == SPACES
        dropped = [3] if rankings == "pairs" else [2, 3]
        assert dataset.dropped == {"longer than --max_length 10 tokens": dropped}
        assert dataset.notes == notes
        assert dataset.used + sum(map(len, dataset.dropped.values())) == 4
        assert sum(steps) == (10 if rankings == "pairs" else 4)
    with pytest.raises(DataError, match=r"4 rows read, 0 used, 4 dropped; .* Nothing is left: raise --max_length"):
        drop_long(read_preferences(path), Words(), 1, lambda _: None)


# Real rows


def real_bad_rows(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "edge/real_bad_rows.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def test_real_bad_rows_as_they_stand(shared: Path, tmp_path: Path) -> None:
    """Some have columns of their source: the error says which are needed. Others are read in their published layout."""
    found = real_bad_rows(shared)
    assert len(found) == 190
    for i, row in enumerate(found):
        path = tmp_path / f"{i}.jsonl"
        path.write_text(json.dumps(row["raw"], ensure_ascii=False) + "\n", encoding="utf-8")
        used, dropped, errors = accounted(path)
        assert len(used) + len(dropped) + len(errors) == 1
        for message in errors.values():
            assert re.match(rf"{re.escape(str(path))}:1: .*--columns \w+=", message)
        published = ("ultrafeedback", "anthropic-hh", "LLMBar", "judgebench")
        assert bool(used or dropped) == row["source"].startswith(published)


def transcript(text: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": words} for role, words in zip(parts[::2], parts[1::2], strict=True)]


def hh(raw: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": transcript(raw["chosen"]), "rejected": transcript(raw["rejected"])}


def llmbar(raw: dict[str, Any]) -> dict[str, Any]:
    sides = [raw["output_1"], raw["output_2"]]
    return {"prompt": raw["input"], "chosen": sides[raw["label"] - 1], "rejected": sides[2 - raw["label"]]}


def judgebench(raw: dict[str, Any]) -> dict[str, Any]:
    sides = [raw["response_A"], raw["response_B"]]
    better = 0 if raw["label"].startswith("A>") else 1
    return {"prompt": raw["question"], "chosen": sides[better], "rejected": sides[1 - better]}


def arena(raw: dict[str, Any]) -> dict[str, Any]:
    turns: list[dict[str, str]] = []
    for answer in raw["turns"]:
        turns += [{"role": "user", "content": "And?"}] if turns else []
        turns.append({"role": "assistant", "content": answer})
    return {"prompt": raw["prompt"], "responses": [turns, "One to compare with."], "scores": [raw["score"], -1]}


def gsm8k(raw: dict[str, Any]) -> dict[str, Any]:
    answer = raw.get("solution", raw.get("answer"))
    return {"prompt": raw["question"], "chosen": answer, "rejected": "I do not know."}


def qa_feedback(raw: dict[str, Any]) -> dict[str, Any]:
    tied = not any(raw["preference"])
    ranks = [1, 1, 1, 1] if tied else [1, 1, 1, 3]  # not a weak order, so no ranks can represent it
    return {"prompt": raw["question"], "responses": raw["predictions"], "ranks": ranks}


# The outcome of each kind of fault, after its columns are converted to one of our formats.
REAL: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], dict[str, str]]] = [
    (
        "anthropic-hh",
        hh,
        {
            "prompt prefix differs": "prompts differ|consecutive turns of one role",
            "consecutive same role": "consecutive turns of one role",
            "last assistant turn empty": "empty response|prompts differ",
        },
    ),
    (
        "LLMBar",
        llmbar,
        {
            "identical responses": "identical responses",
            "empty response": "empty response",
            "newline": "",
            "duplicate": "",
        },
    ),
    ("judgebench", judgebench, {"identical responses": "identical responses", "BEL": ""}),
    (
        "arena",
        arena,
        {
            "empty completion": "empty response",
            "score is null": "scores is not a finite number",
            "turns answered": "prompts differ",
            "113,077": "",
        },
    ),
    ("gsm8k", gsm8k, {"no final answer": "", "unbalanced": "", "U\\+2028": ""}),
    (
        "qa_feedback",
        qa_feedback,
        {"all six pairs tied": r"all responses tie", "weak order": "the ranks are not an order"},
    ),
    (
        "ultrafeedback",
        dict,
        {"identical": "identical responses", "empty": "empty response", "U\\+FFFD": "", "special-token": ""},
    ),
]


@pytest.mark.parametrize(("source", "convert", "reasons"), REAL, ids=[source for source, *_ in REAL])
def test_real_bad_rows_in_our_formats(
    shared: Path,
    tmp_path: Path,
    source: str,
    convert: Callable[[dict[str, Any]], dict[str, Any]],
    reasons: dict[str, str],
) -> None:
    found = [row for row in real_bad_rows(shared) if row["source"].startswith(source)]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(convert(row["raw"]), ensure_ascii=False) + "\n" for row in found), encoding="utf-8"
    )
    used, dropped, errors = accounted(path)
    assert errors == {}
    for line, row in enumerate(found, start=1):
        [expected, *_] = [then for fault, then in reasons.items() if any(re.search(fault, r) for r in row["reasons"])]
        if expected:
            assert re.match(expected, dropped[line]), (row["reasons"], dropped[line])
        else:
            assert line in used


# Fuzzing

NASTY: list[Any] = [
    None, True, 0, -1, 2, 0.5, 10**400, float("nan"), float("inf"), "", " ", "\0", "\ud800", "\u2028", "a" * 5000,
    [], {}, [[]], [None], [{}], [1, 2], ["a", "b"], {"role": "user"}, {"role": "user", "content": ""},
    {"role": "tool", "content": "x"}, {"rank": 0, "completion": "x"}, {"rank": None, "completion": None}, [1, 1, 1],
    [3, 2, 1], [0, 1, 2], [1.0, 2.5, float("nan")],
]  # fmt: skip
KEYS = ["prompt", "chosen", "rejected", "margin", "magnitude", "responses", "ranks", "scores", "aspect", "role", "x"]


def mutated_value(value: Any, draw: random.Random) -> Any:
    """`value` with one part changed, moved, duplicated or removed."""
    if draw.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return draw.choice(NASTY)
    key = draw.choice([*value]) if isinstance(value, dict) else draw.randrange(len(value))
    changed: Any = value.copy()
    what = draw.random()
    if what < 0.6:
        changed[key] = mutated_value(value[key], draw)
    elif what < 0.75:
        del changed[key]
    elif isinstance(changed, list):
        changed.insert(draw.randrange(len(changed) + 1), changed[key])
    else:
        changed[draw.choice(KEYS)] = changed[key] if what < 0.9 else changed.pop(key)
    return changed


def mutated_bytes(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(raw) + 1)
    to = min(len(raw), at + draw.randrange(1, 20))
    new = draw.choice(
        [b"", raw[at:to] * 2, draw.randbytes(to - at), b'"', b"\\", b"{", b"]", b"\x00", b"\xff", b"\\ud800"]
    )
    return raw[:at] + new + raw[to:]


def fuzzed(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    """One line made of one of `rows`."""
    row: Any = draw.choice(rows)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        row = mutated_value(row, draw)
    raw = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        raw = mutated_bytes(raw, draw)
    return raw.replace(b"\n", b" ")


SEEDS = {
    "BINARY": [PAIR, PAIR | {"prompt": [bad_rows.ASK], "chosen": [bad_rows.YES], "margin": 1.5, "aspect": "wit"}],
    "BINARYMAGN": [MAGNITUDE, MAGNITUDE | {"magnitude": 0}],
    "RANKING": [RANKS, SCORES, COMPLETIONS, RANKS | {"scores": [5, 5, 1.5]}],
    "SINGLE": [row | {"prompt": f"Why {i}?"} for i in range(40) for row in SINGLES],
}


def check_fuzzed(path: Path, rows: list[dict[str, Any]], count: int, seed: int, **options: Any) -> None:
    draw = random.Random(seed)
    path.write_bytes(
        b"\n".join([json.dumps(row).encode() for row in rows] + [fuzzed(rows, draw) for _ in range(count)])
    )
    used, dropped, errors = accounted(path, **options)
    with open(path, "rb") as file:
        lines = {number for number, line in enumerate(file, start=1) if line.strip()}
    assert used | dropped.keys() | errors.keys() == lines
    assert min(len(used), len(dropped), len(errors)) > 0.02 * count  # all three outcomes occur
    assert all(message.startswith(f"{path}:{line}: ") for line, message in errors.items())
    assert all(len(message) < 1000 and message.isprintable() for message in errors.values())


@pytest.mark.parametrize("form", SEEDS)
@pytest.mark.parametrize("kept", [False, True])
def test_fuzzed_lines_raise_only_our_errors(tmp_path: Path, form: str, kept: bool) -> None:
    """8 times 12,500 lines."""
    options = {"ties": "keep", "rankings": "plackett_luce"} if kept else {}
    check_fuzzed(tmp_path / "fuzz.jsonl", SEEDS[form], 12_500, seed=len(form) + kept, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["hh/hh_train", "graded/arena_bench_rank7", "graded/webgpt_magnitude", "rmb/rmb_helpful_test"]
)
def test_fuzzed_real_rows(shared: Path, tmp_path: Path, name: str) -> None:
    """4 times 25,000 lines."""
    with gzip.open(shared / f"{name}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file][:300]
    check_fuzzed(tmp_path / "fuzz.jsonl", rows, 25_000, seed=len(name))
