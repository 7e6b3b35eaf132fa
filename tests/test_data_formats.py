"""Rows of each format become the right groups, margins, ranks and sources."""

import gzip
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dwrl_fast.data import Dataset, Preference, Reader, open_rows, read_preferences
from dwrl_fast.errors import DataError

ASK = {"role": "user", "content": "Why?"}
PROMPT = {"prompt": "Why?"}
PAIR = PROMPT | {"chosen": "Because.", "rejected": "No."}
ABC = PROMPT | {"responses": ["a", "b", "c"]}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def groups(dataset: Dataset) -> list[tuple[Any, ...]]:
    """The responses, margin and ranks of each group, and its source after the file name."""
    return [(*row.responses, row.margin, row.ranks, row.source.partition("rows.jsonl:")[2]) for row in dataset.rows]


def read(folder: Path, *rows: Any, **options: Any) -> list[tuple[Any, ...]]:
    return groups(read_preferences(write(folder, *rows), **options))


# BINARY and BINARYMAGN


def test_magnitudes_are_margins_and_neutral_pairs_ties(tmp_path: Path) -> None:
    path = write(tmp_path, *(PAIR | {"magnitude": value} for value in (2, 0, 1, 1.0)))
    dropped, kept = read_preferences(path), read_preferences(path, ties="keep")
    assert [row[2:] for row in groups(dropped)] == [(2.0, (), "1"), (1.0, (), "3"), (1.0, (), "4")]
    assert dropped.dropped == {"neutral: magnitude 0 (--ties keep would use it)": [2]}
    assert [row[2:] for row in groups(kept)][:2] == [(2.0, (), "1"), (0.0, (1, 1), "2")]
    assert kept.format == dropped.format == "BINARYMAGN"
    assert kept.summary == f"{path} (BINARYMAGN): 4 rows read, 4 used, 0 dropped"


@pytest.mark.parametrize("value", [-1, 3, 0.5, 1e300])
def test_other_magnitudes_are_counted(tmp_path: Path, value: float) -> None:
    dataset = read_preferences(write(tmp_path, PAIR | {"magnitude": 1}, PAIR | {"magnitude": value}))
    assert dataset.dropped == {"magnitude is not 0, 1 or 2": [2]}


def test_a_margin_goes_before_a_magnitude(tmp_path: Path) -> None:
    dataset = read_preferences(write(tmp_path, PAIR | {"magnitude": "large", "margin": 0.5}))
    assert (dataset.format, dataset.rows[0].margin) == ("BINARY", 0.5)


# RANKING


def test_every_two_of_a_ranking(tmp_path: Path) -> None:
    expected = [("b", "a", 1.0, (), "1:2-1"), ("b", "c", 2.0, (), "1:2-3"), ("a", "c", 1.0, (), "1:1-3")]
    assert read(tmp_path, ABC | {"ranks": [2, 1, 3]}) == expected
    completions = [{"rank": rank, "completion": text} for rank, text in ((1, "a"), (0, "b"), (2, "c"))]
    assert read(tmp_path, {"context": "Why?", "completions": completions}) == expected


def test_scores_are_order_and_margins_and_ranks_the_order(tmp_path: Path) -> None:
    alone = read(tmp_path, ABC | {"scores": [2, 9.5, -1]})
    assert alone == [("b", "a", 7.5, (), "1:2-1"), ("b", "c", 10.5, (), "1:2-3"), ("a", "c", 3.0, (), "1:1-3")]
    assert read(tmp_path, ABC | {"scores": [2, 9.5, -1], "ranks": [2, 1, 3]}) == alone
    assert read(tmp_path, ABC | {"scores": [2, 2, -1], "ranks": [2, 1, 3]})[0] == ("b", "a", 0.0, (), "1:2-1")
    assert read(tmp_path, ABC | {"scores": [2, 2, -1], "ranks": [1, 2, 3]})[0] == ("a", "b", 0.0, (), "1:1-2")
    tied = read(tmp_path, ABC | {"scores": [9.5, 2, -1], "ranks": [1, 1, 3]}, ties="keep")
    assert tied[0] == ("a", "b", 0.0, (1, 1), "1:1-2")


def test_a_ranking_kept_whole(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rankings": "plackett_luce"}
    assert read(tmp_path, ABC | {"ranks": [2, 1, 3]}, **options) == [("b", "a", "c", 0.0, (), "1")]
    assert read(tmp_path, ABC | {"scores": [5, 7, 5]}, **options) == [("b", "a", "c", 0.0, (1, 2, 2), "1")]
    assert read(tmp_path, ABC | {"ranks": [2, 2, 1]}, **options)[0][:3] == ("c", "a", 1.0)  # best of n
    two = PROMPT | {"responses": ["a", "b"], "scores": [1, 4]}
    assert read(tmp_path, two, **options) == read(tmp_path, two) == [("b", "a", 3.0, (), "1:2-1")]


@pytest.mark.parametrize(("ranks", "kept"), [([1, 2, 2, 4], True), ([1, 2, 2, 3], True), ([1, 1, 1, 1], False)])
def test_ties_of_a_ranking(tmp_path: Path, ranks: list[int], kept: bool) -> None:
    rows = [ABC | {"ranks": [1, 2, 3]}, PROMPT | {"responses": list("abcd"), "ranks": ranks}]
    path = write(tmp_path, *rows)
    whole = read_preferences(path, rankings="plackett_luce")
    assert [row.ranks for row in whole.rows] == [(), *([tuple(ranks)] if kept else [])]
    assert whole.dropped == ({} if kept else {"all responses tie (--ties keep would use them)": [2]})
    assert read_preferences(path, rankings="plackett_luce", ties="keep").rows[1].ranks == tuple(ranks)
    pairs = [row for row in read_preferences(path, ties="keep").rows if row.lines == (2,)]
    assert len(pairs) == 6
    assert Counter(row.ranks for row in pairs)[(1, 1)] == (1 if kept else 6)


def test_long_tied_rankings_become_pairs(tmp_path: Path) -> None:
    for count, tied in ((7, True), (8, True), (8, False)):
        ranks = [1, 1, *range(3, count + 1)] if tied else list(range(1, count + 1))
        row = PROMPT | {"responses": [f"r{i}" for i in range(count)], "ranks": ranks}
        dataset = read_preferences(write(tmp_path, row), rankings="plackett_luce")
        if count == 8 and tied:
            assert len(dataset.rows) == 27
            assert dataset.notes == {
                "tied rankings of more than 7 responses taken as pairs": 1,
                "pairs left out: tied": 1,
            }
        else:
            assert [len(row.responses) for row in dataset.rows] == [count]


def test_losers_of_a_best_of_n_row_are_not_compared(tmp_path: Path) -> None:
    row = PROMPT | {"responses": list("abcd"), "ranks": [2, 2, 1, 2]}
    for options in itertools.product(("drop", "keep"), ("pairs", "plackett_luce")):
        dataset = read_preferences(write(tmp_path, row), ties=options[0], rankings=options[1])  # type: ignore[arg-type]
        assert groups(dataset) == [("c", loser, 1.0, (), f"1:3-{i}") for i, loser in ((1, "a"), (2, "b"), (4, "d"))]
        assert dataset.notes == {"pairs left out: losers of a best-of-n row": 3}
        assert dataset.summary.endswith(
            "0 dropped; 3 groups from the 1 used rows; 3 x pairs left out: losers of a best-of-n row"
        )
    scored = PROMPT | {"responses": list("abc"), "scores": [1, 1, 2]}  # here the scores say that the losers are equal
    assert len(read(tmp_path, scored, ties="keep")) == 3


def test_identical_responses_of_a_ranking(tmp_path: Path) -> None:
    row = PROMPT | {"responses": ["a", "a\n", "b"], "ranks": [1, 2, 3]}
    dataset = read_preferences(write(tmp_path, row))
    assert [row.responses for row in dataset.rows] == [("a", "b"), ("a\n", "b")]
    assert dataset.notes == {"pairs left out: identical responses": 1}
    with pytest.raises(DataError, match=r"no usable row: .* 1 x identical responses \(line 1\)"):
        read_preferences(write(tmp_path, row), rankings="plackett_luce")


def test_a_margin_that_overflows_is_left_out(tmp_path: Path) -> None:
    dataset = read_preferences(write(tmp_path, ABC | {"scores": [1.7e308, -1.7e308, 0]}))
    assert [row.margin for row in dataset.rows] == [1.7e308, 1.7e308]
    assert dataset.notes == {"pairs left out: margin is not a finite number": 1}


def test_trl_forms_of_a_ranking(tmp_path: Path) -> None:
    yes, no = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
    more, system = {"role": "user", "content": "And?"}, {"role": "system", "content": "Be brief."}
    ranks = {"ranks": [1, 2]}
    for row, prompt in (
        (PROMPT | {"responses": ["Because.", "No."]}, (ASK,)),
        ({"prompt": [system, ASK], "responses": [[yes], "No."]}, (system, ASK)),
        ({"responses": [[ASK, yes], [ASK, no]]}, (ASK,)),
        (PROMPT | {"responses": [[ASK, no, more, yes], [ASK, no, more, no]]}, (ASK, no, more)),
    ):
        [found] = read_preferences(write(tmp_path, row | ranks)).rows
        assert (found.prompt, found.responses) == (prompt, ("Because.", "No."))
    aspect = read_preferences(write(tmp_path, ABC | {"ranks": [1, 2, 3], "aspect": "wit"}))
    assert {row.aspect for row in aspect.rows} == {"wit"}


def test_nulls_of_a_union_of_columns(tmp_path: Path) -> None:
    rows = [ABC | {"ranks": [1, 2, 3], "scores": None}, ABC | {"ranks": None, "scores": [5, 3, 1]}]
    dataset = read_preferences(write(tmp_path, *rows, ABC | {"ranks": None, "scores": None}), rankings="plackett_luce")
    assert [row.responses for row in dataset.rows] == [("a", "b", "c")] * 2
    assert dataset.dropped == {"null ranks and scores": [3]}


# SINGLE


def single(prompt: str, completion: str, score: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "score": score} | more


SINGLES = [
    single("p", "a", 3),
    single("q", "x", 1),
    single("p", "b", 5),
    single("p", "c", 3),
    single("r", "z", 2),
    single("q", "y", 1),
    single("p", "b ", 4, aspect=None),
    single("p", "d", 4, aspect="wit"),
]


def test_completions_of_one_prompt_are_compared_wherever_they_stand(tmp_path: Path) -> None:
    dataset = read_preferences(write(tmp_path, *SINGLES))
    assert groups(dataset) == [
        ("b", "a", 2.0, (), "3-1"),
        ("b", "c", 2.0, (), "3-4"),
        ("b ", "a", 1.0, (), "7-1"),
        ("b ", "c", 1.0, (), "7-4"),
    ]
    assert dataset.rows[0].lines == (3, 1)
    assert dataset.used == 4
    assert dataset.dropped == {
        "no other score for its prompt (--ties keep would use it)": [2, 6],
        "the only completion of its prompt": [5, 8],
    }
    assert dataset.notes == {"pairs left out: tied": 2, "pairs left out: identical responses": 1}
    kept = read_preferences(write(tmp_path, *SINGLES), ties="keep")
    assert [row.source.rpartition(":")[2] for row in kept.rows if row.ranks == (1, 1)] == ["1-4", "2-6"]


def test_completions_that_stand_together_are_compared_at_once(tmp_path: Path) -> None:
    rows = [single("p", "a", 3), single("p", "", 4), single("p", "b", 5), single("q", "x", 1), single("q", "y", 2)]
    path = write(tmp_path, *rows, single("p", "c", 1))
    reader = Reader(open_rows(path), consecutive=True)
    outcomes = list(reader.read())
    assert [[row.responses for row in outcome.preferences] for outcome in outcomes if outcome.preferences] == [
        [("b", "a")],
        [("y", "x")],
    ]
    assert [reason for outcome in outcomes for reason in outcome.dropped] == [
        ("empty response", 2),
        ("the only completion of its prompt", 6),
    ]
    assert [outcome.after.line for outcome in outcomes] == [3, 5, 6]
    for i, outcome in enumerate(outcomes):
        assert list(reader.read(outcome.after)) == outcomes[i + 1 :]


# Recognition


@pytest.mark.parametrize(
    ("row", "columns", "form"),
    [
        (PAIR, {}, "BINARY"),
        ({"q": "Why?", "good": "a", "bad": "b"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}, "BINARY"),
        (PAIR | {"strength": 2}, {"magnitude": "strength"}, "BINARYMAGN"),
        (ABC | {"overall": [1, 2, 3]}, {"scores": "overall"}, "RANKING"),
        ({"question": "Why?", "completions": [{"rank": i, "completion": c} for i, c in enumerate("ab")]},
         {"context": "question"}, "RANKING"),
        (PAIR | ABC | {"ranks": [1, 2, 3]}, {}, "BINARY"),
    ],
)  # fmt: skip
def test_formats_are_told_from_their_columns(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], form: str
) -> None:
    dataset = read_preferences(write(tmp_path, row), columns=columns)
    assert dataset.format == form
    assert f"({form})" in dataset.summary


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"text": "a"}],
            {},
            r":1: the columns 'text' match no format. The formats need chosen and rejected; or .*--col",
        ),
        ([{}], {}, ":1: the columns none match no format"),
        (
            [PAIR, ABC | {"ranks": [1, 2, 3]}],
            {},
            ":2: the columns of a RANKING row, but .* BINARY; put the two in sep",
        ),
        ([PAIR | {"magnitude": 1}, PAIR], {}, ":2: the columns of a BINARY row, but .* BINARYMAGN"),
        (
            [PAIR | {"overall": 3}],
            {"score": "overall"},
            ":1: the rows are BINARY, which has no 'score'; leave --columns sc",
        ),
        ([PAIR], {"magnitude": "strength"}, ":1: no column 'strength' among .*--columns magnitude=NAME"),
        ([ABC], {}, ":1: no column 'ranks' among 'prompt', 'responses'; .*--columns ranks=NAME"),
        ([PROMPT | {"ranks": [1, 2]}], {}, ":1: no column 'responses' among"),
        ([{"completion": "a", "prompt": "p"}], {}, ":1: no column 'score' among .*--columns score=NAME"),
        ([{"completions": [{"rank": 0, "completion": "a"}]}], {}, ":1: no column 'context' among .*--columns context="),
        ([{f"column {i}": 1 for i in range(100)}], {}, r":1: the columns 'column 0', .*'column 11', \.\.\. match"),
    ],
)
def test_rows_of_no_format_or_of_another_are_errors(
    tmp_path: Path, rows: list[Any], columns: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl{message}"):
        read_preferences(write(tmp_path, *rows), columns=columns)


# Groups taken out again


def test_a_row_is_dropped_when_none_of_its_groups_is_left(tmp_path: Path) -> None:
    path = write(tmp_path, ABC | {"ranks": [1, 2, 3]}, PROMPT | {"responses": ["d", "e", "f"], "ranks": [1, 2, 3]})
    dataset = read_preferences(path)
    dataset.leave_out([(row, "too long") for row in dataset.rows if row.lines == (2,) or "c" in row.responses])
    assert [row.responses for row in dataset.rows] == [("a", "b")]
    assert dataset.dropped == {"too long": [2]}
    assert dataset.notes == {"groups left out: too long": 2}
    assert "2 rows read, 1 used, 1 dropped" in dataset.summary


@pytest.mark.parametrize(
    ("source", "lines"),
    [("f:7", (7,)), ("f:7:1-2", (7,)), ("f:7-9", (7, 9)), ("hub/name:test:7:1-2", (7,)), ("", ()), ("f", ())],
)
def test_lines_of_a_source(source: str, lines: tuple[int, ...]) -> None:
    assert Preference((), ("a", "b"), source=source).lines == lines


# The real files


def strict_pairs(row: dict[str, Any], ties: bool) -> list[tuple[str, str, float]]:
    """The pairs of a graded row by brute force: every ordered pair whose first response is better, or tied and
    earlier.
    """
    scores, texts = row.get("scores"), row["responses"]
    ranks = row.get("ranks") or [1 + sum(other > score for other in row["scores"]) for score in row["scores"]]
    bon = not scores and len(ranks) > 2 and ranks.count(1) == 1 and len(set(ranks)) == 2
    found = []
    for i, j in itertools.product(range(len(texts)), repeat=2):
        better = ranks[i] < ranks[j] or (ties and not bon and ranks[i] == ranks[j] and i < j)
        if better and texts[i].strip() != texts[j].strip():
            margin = 0.0 if ranks[i] == ranks[j] else scores[i] - scores[j] if scores else float(ranks[j] - ranks[i])
            found.append((texts[i], texts[j], margin))
    return found


GRADED = {
    "webgpt_magnitude": (901, 245),
    "qa_feedback_rank4": (500, 12),
    "arena_bench_rank7": (299, 2),
    "arena_bench_likert15": (298, 1),
    "rmb_bon_helpful": (800, 0),
}


@pytest.mark.parametrize("name", GRADED)
def test_real_graded_files(shared: Path, name: str) -> None:
    path = shared / f"graded/{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        raw = [json.loads(line) for line in file]
    read, tied = GRADED[name]
    for ties in (False, True):
        dataset = read_preferences(path, ties="keep" if ties else "drop")
        assert (dataset.used, sum(map(len, dataset.dropped.values()))) == ((read, 0) if ties else (read - tied, tied))
        found = Counter((*row.responses, row.margin) for row in dataset.rows)
        assert found == Counter(pair for row in raw for pair in strict_pairs(row, ties))
        whole = read_preferences(path, ties="keep" if ties else "drop", rankings="plackett_luce")
        assert (whole.used, sum(map(len, whole.dropped.values()))) == (
            dataset.used,
            sum(map(len, dataset.dropped.values())),
        )


def test_real_scores_as_single_rows_give_the_pairs_of_the_ranking(shared: Path, tmp_path: Path) -> None:
    path = shared / "graded/arena_bench_likert15.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        raw = [json.loads(line) for line in file]
    rows = [
        {"prompt": row["prompt"], "completion": text, "score": score}
        for row in raw
        for text, score in zip(row["responses"], row["scores"], strict=True)
    ]
    random.Random(0).shuffle(rows)
    single = read_preferences(write(tmp_path, *rows))
    assert single.used + sum(map(len, single.dropped.values())) == len(rows)

    def pairs(dataset: Dataset) -> Counter[tuple[Any, ...]]:
        return Counter((row.prompt[-1]["content"], *row.responses, row.margin) for row in dataset.rows)

    assert pairs(single) == pairs(read_preferences(path))
