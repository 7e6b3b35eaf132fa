"""Layouts of public data are detected, read correctly, reported, overridden, and refused if ambiguous."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from chats import applied, real_tokenizer
from conftest import ROOT
from layout_rows import ASK, HISTORY, MADE, NO, PAIR, YES, Made
from test_data_check import run

from dwrl_fast.data import Dataset, read_preferences
from dwrl_fast.data.check import check
from dwrl_fast.data.formats import BINARY
from dwrl_fast.data.layouts import LAYOUTS, layout_table
from dwrl_fast.data.layouts.many import OVERALL_READ, UNRATED
from dwrl_fast.dialog import Dialog
from dwrl_fast.errors import DataError

# The files of the folder `foreign`: used rows, rows dropped as ties, and the logged text.
FOREIGN: dict[str, tuple[int, int, str]] = {
    "array.json": (5, 0, ""),
    "array_oneline.json": (5, 0, ""),
    "pairs.csv": (5, 0, ""),
    "pairs.tsv": (5, 0, ""),
    "shards": (5, 0, ""),
    "alpaca.jsonl": (3, 0, ""),
    "alpaca_output_list.json": (1, 0, ""),
    "system_column.jsonl": (3, 0, ""),
    "system_column_trl.jsonl": (3, 0, ""),
    "sharegpt.jsonl": (5, 0, ""),
    "sharegpt_system.json": (3, 0, ""),
    "sharegpt_strings.jsonl": (3, 0, ""),
    "message_dicts.jsonl": (3, 0, ""),
    "messages_column.jsonl": (3, 0, ""),
    "content_parts.jsonl": (3, 0, ""),
    "hh_transcripts.jsonl": (5, 0, ""),
    "hh_prompt_transcript.jsonl": (3, 0, ""),
    "label_1_2.jsonl": (5, 0, ""),
    "label_a_b.jsonl": (4, 1, ""),
    "arena_conversations.jsonl": (3, 2, ""),
    "arena_strings.jsonl": (3, 2, ""),
    "better_id.jsonl": (5, 0, "'safer_response_id'"),
    "overall_preference.jsonl": (4, 1, ""),
    "refs_labels.jsonl": (5, 0, ""),
    "completion_winner.jsonl": (5, 0, ""),
    "ultrafeedback.jsonl": (3, 0, "9 groups"),
    "answers_rank.jsonl": (3, 0, "9 groups"),
    "answers_scores.jsonl": (3, 0, ""),
    "aspect_scores.jsonl": (10, 0, "5 groups"),
    "summaries_choice.jsonl": (3, 0, ""),
    "margins.jsonl": (5, 0, ""),
    "margins_dashes.jsonl": (3, 0, ""),
    "margins_reversed.jsonl": (1, 0, "scores contradict chosen and rejected"),
    "true_false.jsonl": (10, 0, "5 groups"),
    "ignored_columns.jsonl": (1, 0, "columns not read: 'input', 'label', 'winner'"),
    "tools_and_images.jsonl": (2, 0, "columns not read: 'tools', 'images'"),
    "prompt_in_response.jsonl": (2, 0, "2 x rows whose responses begin with their own prompt"),
    "hetero_messages.jsonl": (2, 0, "fields of messages not read: 'language'"),
    "hetero.parquet": (2, 0, "fields of messages not read: 'language'"),
    "margin_null.parquet": (2, 0, ""),
    "show_best_of_n.jsonl": (1, 0, ""),
    "show_context.jsonl": (1, 0, ""),
    "show_rank2.jsonl": (1, 0, ""),
    "show_single.jsonl": (2, 0, ""),
}
# fmt: off
REFUSED = {
    "reasoning_field.jsonl": r"2 x identical responses: they differ only in .* which is not read .line 1, 2",
    "column_twice.parquet": r"the column name 'prompt' occurs 2 times",
    "bool_response.jsonl": r"_response.jsonl:1: 'responses' should hold a string or a list of messages, not the bool",
}
WORSE = {
    "Fifteen is prime.",
    "Venus, I believe.",
    "Give report now.",
    "It means very rare.",
    "Cusco",
    "Nine",
    "No idea.",
}


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dropped(dataset: Dataset) -> int:
    return sum(map(len, dataset.dropped.values()))


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(shared: Path, name: str) -> None:
    used, tied, said = FOREIGN[name]
    dataset = read_preferences(shared / "foreign" / name)
    assert (dataset.used, dropped(dataset)) == (used, tied)
    assert all(reason.startswith("tie ") for reason in dataset.dropped)
    assert said in dataset.summary
    whole = read_preferences(shared / "foreign" / name, rankings="plackett_luce")
    assert not any(row.responses[0] in WORSE for row in whole.rows)
    kept = read_preferences(shared / "foreign" / name, ties="keep")
    assert kept.used == used + tied and sum(bool(row.ranks) for row in kept.rows) >= tied
    report = check(shared / "foreign" / name)
    assert (report.used, report.rows, report.groups) == (used, used + tied, len(dataset.rows))


@pytest.mark.parametrize("name", REFUSED)
def test_foreign_files_that_are_refused(shared: Path, name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name]):
        read_preferences(shared / "foreign" / name)


def test_every_foreign_file_is_tried(shared: Path) -> None:
    found = {path.name for path in (shared / "foreign").iterdir()} - {"README.md"}
    assert found == FOREIGN.keys() | REFUSED.keys()


def check_made(dataset: Dataset, made: Made) -> None:
    rows = 1 if made.together else len(made.rows)
    assert len(dataset.rows) == rows * made.pairs
    assert not dataset.dropped
    for row in dataset.rows:
        assert [(turn["role"], turn["content"]) for turn in row.prompt] == made.prompt
        assert row.margin == made.margin and row.ranks == ()
    if made.pairs == 1:
        assert {row.responses for row in dataset.rows} == {(YES, NO)}
    else:
        assert {row.responses for row in dataset.rows} <= {(YES, NO), ("So.", NO), (YES, "Hm.")}


@pytest.mark.parametrize("name", MADE)
def test_each_layout_is_told_and_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    made = MADE[name]
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    for number, rows in enumerate([made.rows] if made.together else [[row] for row in made.rows]):
        path = write(tmp_path, *rows, name=f"{number}.jsonl")
        caplog.clear()
        with caplog.at_level(logging.INFO):
            dataset = read_preferences(path)
        [said] = [line for line in caplog.messages if "read as" in line]
        assert layout.title in said and name in said
        check_made(dataset, Made(rows, made.prompt, made.margin, made.pairs, made.together))
    check_made(read_preferences(write(tmp_path, *made.rows), layout=name), made)
    if made.tie:
        path = write(tmp_path, *(row | made.tie for row in made.rows))
        [row, *_] = kept = read_preferences(path, layout=name, ties="keep").rows
        assert (len(kept), row.ranks, row.margin) == (len(made.rows), (1, 1), 0.0)
        with pytest.raises(DataError, match=f"{len(kept)} x tie .--ties keep would use it"):
            read_preferences(path, layout=name)


def test_every_layout_has_rows() -> None:
    assert [layout.name for layout in LAYOUTS] == list(MADE)
    assert len({layout.title for layout in LAYOUTS}) == len(LAYOUTS)


@pytest.mark.parametrize("tokenizer", ["llama3", "qwen2.5"])
def test_ids_are_those_of_the_chat_template(shared: Path, tmp_path: Path, tokenizer: str) -> None:
    chat = real_tokenizer(shared, tokenizer)
    dialog = Dialog(chat)
    for name, made in MADE.items():
        row = read_preferences(write(tmp_path, *made.rows), layout=name).rows[0]
        turns = [{"role": role, "content": content} for role, content in made.prompt]
        sequence = dialog.plain(row.prompt, row.responses[0])
        answered = applied(chat, [*turns, {"role": "assistant", "content": row.responses[0]}], head=False)  # type: ignore[list-item]
        assert list(sequence.ids) == answered[: len(sequence.ids)], name
        assert list(sequence.ids)[: sequence.response.start] == applied(chat, turns), name  # type: ignore[arg-type]


# How they go together, and what is refused


def test_layouts_of_pairs_go_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"from": "human" if role == "user" else "gpt", "value": text} for role, text in HISTORY]
    row = {"system": "Be brief.", "conversations": turns, **PAIR, "score_chosen": "3", "score_rejected": 1, "id": 7}
    with caplog.at_level(logging.INFO):
        [found] = read_preferences(write(tmp_path, row)).rows
    assert [turn["content"] for turn in found.prompt] == ["Be brief.", "Hi", "Hello.", ASK]
    assert (found.margin, found.id) == (2.0, "7")
    assert "--layout sharegpt+system+margins" in caplog.text
    assert read_preferences(write(tmp_path, row), layout="sharegpt+system+margins").rows == [found]


def test_history_of_alpaca(tmp_path: Path) -> None:
    row = {"instruction": ASK, "input": "", "system": None, "history": [["Hi", "Hello."]], **PAIR}
    [found] = read_preferences(write(tmp_path, row)).rows
    assert [(turn["role"], turn["content"]) for turn in found.prompt] == HISTORY
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'history' should hold pairs of a question and its answer"):
        read_preferences(write(tmp_path, row | {"history": [["Hi"]]}))


def test_an_ambiguous_layout_is_refused_with_its_candidates(tmp_path: Path) -> None:
    row = {"prompt": ASK, **PAIR, "response_a": NO, "response_b": YES, "winner": "model_a"}
    path = write(tmp_path, row)
    with pytest.raises(
        DataError,
        match=r"rows.jsonl:1: the rows can be read in several ways; choose .*--layout NAME: plain \(BINARY\), arena",
    ):
        read_preferences(path)
    assert read_preferences(path, layout="plain").rows[0].responses == (YES, NO)
    assert read_preferences(path, layout="arena").rows[0].responses == (NO, YES)
    with pytest.raises(DataError, match=r"--layout arena\+system: these layouts cannot be combined"):
        read_preferences(path, layout="arena+system")
    with pytest.raises(DataError, match="--layout arenas: there is no layout of that name; did you mean 'arena'"):
        read_preferences(path, layout="arenas")


def test_plain_reads_our_columns_alone(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": ASK, **PAIR, "system": "Be brief.", "score_chosen": 4, "score_rejected": 1})
    plain = read_preferences(path, layout="plain")
    assert (len(plain.rows[0].prompt), plain.rows[0].margin) == (1, 0.0)
    assert plain.warnings == ["the column 'system' is not read, in 1 rows: --layout system reads it as the system turn"]
    assert "columns not read: 'system', 'score_chosen', 'score_rejected'" in plain.summary


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("label_1_2", {"label": 0}, "'label' should hold one of 1, 2, tie, not the int 0; the rows are read"),
        ("label_a_b", {"label": [1]}, "'label' should hold one of a, .*not the list"),
        ("overall_preference", {"overall_preference": "much"}, "'overall_preference' should hold a number, not"),
        ("summaries", {"choice": 2}, "'choice' should hold 0 or 1, not the int 2"),
        ("summaries", {"summaries": "a"}, "'summaries' should hold a list, not the str"),
        ("ultrafeedback", {"completions": [{"response": "a"}, "b"]}, "'completions' should hold a list of objects"),
        ("true_false", {"label": "yes"}, "'label' should hold true or false, not the str 'yes'"),
        ("sharegpt", {"chosen": {"from": "gpt"}}, "'chosen' should hold a string or a list of messages, not the dict"),
    ],
)
def test_rows_not_of_the_layout_are_errors(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    [row, *_] = MADE[name].rows
    with pytest.raises(DataError, match=f"rows.jsonl:2: {message}"):
        read_preferences(write(tmp_path, row, row | change))


@pytest.mark.parametrize("name", MADE)
def test_a_missing_column_names_the_layout(tmp_path: Path, name: str) -> None:
    [row, *_] = MADE[name].rows
    with pytest.raises(DataError, match=r"rows.jsonl:2: no column '.*--(columns|layout)"):
        read_preferences(write(tmp_path, row, {"x": 1}))


@pytest.mark.parametrize("name", ["label_1_2", "arena", "completion_winner", "better_id", "references"])
def test_a_null_verdict_is_no_comparison(tmp_path: Path, name: str) -> None:
    [row, *_] = MADE[name].rows
    verdict = next(key for key in ("label", "winner", "better_response_id", "labels") if key in row)
    dataset = read_preferences(write(tmp_path, row, row | {verdict: None}))
    assert dataset.dropped == {f"null {verdict}": [2]}


def test_ratings_by_aspect(tmp_path: Path) -> None:
    path = write(tmp_path, *MADE["ultrafeedback"].rows)
    overall, honesty = read_preferences(path), read_preferences(path, aspect="honesty")
    assert (overall.rows[0].responses, overall.rows[0].margin) == ((YES, NO), 6.5)
    assert (honesty.rows[0].responses, honesty.rows[0].margin) == ((NO, YES), 4.0)
    assert honesty.notes == {UNRATED: 1} and overall.notes == {UNRATED: 1, OVERALL_READ: 1} and not overall.warnings
    path = write(tmp_path, *MADE["aspect_scores"].rows)
    assert read_preferences(path, aspect="Verbosity ").rows[0].responses == (NO, YES)
    rows = [{name: value for name, value in row.items() if name != "helpfulness"} for row in MADE["aspect_scores"].rows]
    with pytest.raises(
        DataError, match=r":1: the rows are read as scores .* no scores of helpfulness; .* to take: --aspect verbosity"
    ):
        read_preferences(write(tmp_path, *rows))


def completion(text: str, overall: float, **ratings: Any) -> dict[str, Any]:
    annotations = {name: {"Rating": rating} for name, rating in ratings.items()}
    return {"response": text, "overall_score": overall, "annotations": annotations}


def test_the_scores_read_are_of_the_aspect_asked(tmp_path: Path) -> None:
    """An aspect is also a part of a question, and may be the row's own."""
    answers = [completion(YES, 9, instruction_following="1"), completion(NO, 2, instruction_following="4")]
    row = {"instruction": ASK, "completions": answers}
    for aspect in ("instruction_following", "instruction following", "Instruction-Following"):
        dataset = read_preferences(write(tmp_path, row), aspect=aspect)
        assert dataset.rows[0].responses == (NO, YES) and not dataset.notes
    own = read_preferences(write(tmp_path, row | {"aspect": "instruction following"}), aspect="honesty")
    assert own.rows[0].responses == (NO, YES) and not own.notes
    columns = [{"prompt": ASK, "response": text, "helpfulness": i, "honesty": -i} for i, text in enumerate([NO, YES])]
    path = write(tmp_path, *(each | {"aspect": "Honesty"} for each in columns))
    assert read_preferences(path).rows[0].responses == (NO, YES)


def test_a_blank_aspect_is_none(tmp_path: Path) -> None:
    for aspect in ("", " ", None):
        rows = [row | {"aspect": aspect} for row in MADE["aspect_scores"].rows]
        [found] = read_preferences(write(tmp_path, *rows)).rows
        assert (found.responses, found.aspect) == ((YES, NO), None)
        [found] = read_preferences(write(tmp_path, *rows), aspect="verbosity").rows
        assert found.responses == (NO, YES)
        [found] = read_preferences(write(tmp_path, {"prompt": ASK, **PAIR, "aspect": aspect})).rows
        assert found.aspect is None, "with_aspect then gives it the file's"


def test_scores_of_another_aspect_are_not_read_in_silence(tmp_path: Path) -> None:
    row = {"instruction": ASK, "completions": [completion(YES, 9, honesty="1"), completion(NO, 2, honesty="4")]}
    dataset = read_preferences(write(tmp_path, row), aspect="honest")
    assert dataset.rows[0].responses == (YES, NO)
    [warning] = dataset.warnings
    assert warning.startswith("1 x rows read by their overall scores, because they have no ratings of the aspect")
    unrated = {"instruction": ASK, "completions": [completion(YES, 9), completion(NO, 2)]}
    dataset = read_preferences(write(tmp_path, unrated), aspect="honest")
    assert dataset.rows[0].responses == (YES, NO) and not dataset.notes, "nothing is by aspect, as in plain pairs"
    path = write(tmp_path, *MADE["aspect_scores"].rows)
    with pytest.raises(
        DataError, match=r"scores of depth; .* --aspect helpfulness or verbosity\. .*=helpfulness, without --layout"
    ):
        read_preferences(path, aspect="depth", layout="aspect_scores")
    assert read_preferences(path, aspect="depth", columns={"score": "verbosity"}).rows[0].responses == (NO, YES)


def test_two_scales_are_never_mixed_in_a_row(tmp_path: Path) -> None:
    answers = [completion(NO, 10), completion("?", 1, honesty=5), completion(YES, 2, honesty="4")]
    answers[2]["annotations"]["honesty"] = 4
    dataset = read_preferences(write(tmp_path, {"instruction": ASK, "completions": answers}), aspect="honesty")
    assert [(row.responses, row.margin) for row in dataset.rows] == [(("?", YES), 1.0)]
    assert dataset.notes == {UNRATED: 1}


def test_columns_name_those_of_a_layout(tmp_path: Path) -> None:
    rows = [{"ask": ASK, "response_0": NO, "response_1": YES, "better_response_id": 0, "safer_response_id": 1}]
    columns = {"prompt": "ask", "better_response_id": "safer_response_id"}
    assert read_preferences(write(tmp_path, *rows), columns=columns).rows[0].responses == (YES, NO)
    for wrong in ({"safer_response_id": "ask"}, {"margin": "absent"}):
        for layout in (None, "better_id"):
            with pytest.raises(DataError, match=r"--columns|there is no column"):
                read_preferences(write(tmp_path, *rows), columns=wrong, layout=layout)


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS if layout.form is BINARY])
def test_a_column_tie_is_read_in_every_layout_of_pairs(tmp_path: Path, layout: str) -> None:
    for row in MADE[layout].rows:
        for name, columns in (("tie", {}), ("is_tie", {"tie": "is_tie"})):
            rows = [row | {name: value} for value in (True, False, None)]
            path = write(tmp_path, *rows)
            kept = read_preferences(path, ties="keep", columns=columns)
            assert [(found.ranks, found.margin) for found in kept.rows[:1]] == [((1, 1), 0.0)]
            assert [(found.ranks, found.margin) for found in kept.rows[1:]] == [((), MADE[layout].margin)] * 2
            assert not kept.unread.columns.keys() & {"tie", "is_tie"}
            assert read_preferences(path, columns=columns).dropped == {"tie (--ties keep would use it)": [1]}


def test_a_tie_in_a_table_is_its_word(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"system,prompt,chosen,rejected,tie\nBe brief.,{ASK},{YES},{NO},True\n,{ASK},{YES},{NO},False\n")
    assert [row.ranks for row in read_preferences(path, ties="keep").rows] == [(1, 1), ()]


@pytest.mark.parametrize(
    ("layout", "name", "change"),
    [
        ("system", "score", {}),
        ("system", "magnitude", {"margin": 1}),  # a margin has priority, as in rows without layout
        ("system", "tie", {"magnitude": 1}),
        ("system", "question", {"prompt": ASK}),
        ("ultrafeedback", "margin", {}),
        ("scored", "tie", {}),
        ("aspect_scores", "score", {}),
    ],
)
def test_a_mapped_column_that_is_not_read_is_refused(
    tmp_path: Path, layout: str, name: str, change: dict[str, Any]
) -> None:
    rows = [row | change for row in MADE[layout].rows]
    path = write(tmp_path, *(row | {"theirs": 2.0} for row in rows))
    for told in [layout, *[None] * (name != "score")]:  # with a score the rows have another layout
        with pytest.raises(DataError, match=f":1: --columns {name}=theirs: no '{name}' is read; the rows are read as"):
            read_preferences(path, columns={name: "theirs"}, layout=told)
    name = {"question": "prompt"}.get(name, name)
    path = write(tmp_path, *(row | {name: ASK if name == "prompt" else 2.0} for row in rows))
    unread = read_preferences(path, layout=layout).unread
    assert name == "prompt" or unread.columns[name] == len(rows), "without a mapping it is reported"


def test_a_mapped_column_may_be_empty_in_the_first_row(tmp_path: Path) -> None:
    path = write(tmp_path, *({"system": "", "prompt": ASK, **PAIR, "gap": gap} for gap in (None, 2)))
    assert [row.margin for row in read_preferences(path, columns={"margin": "gap"}).rows] == [0.0, 2.0]


def test_several_processes_refuse_a_mapped_column_that_is_not_read(tmp_path: Path) -> None:
    [row] = MADE["ultrafeedback"].rows
    path = write(tmp_path, *[row | {"gap": 1}] * 40)
    for processes in (1, 2):
        report = check(path, columns={"margin": "gap"}, layout="ultrafeedback", processes=processes, stretch=2000)
        assert report.used == 0 and report.rows == 40
        assert all("no 'margin' is read" in said for said in report.advice.values())


def test_scores_that_contradict_are_no_margin(tmp_path: Path) -> None:
    row = {"prompt": ASK, **PAIR, "score_chosen": 1, "score_rejected": 9}
    dataset = read_preferences(write(tmp_path, row, row | {"margin": 2}, row | {"score_chosen": None}))
    assert [found.margin for found in dataset.rows] == [0.0, 2.0, 0.0]
    [warning] = dataset.warnings
    assert warning.startswith("1 x scores contradict chosen and rejected")


# The command and the documentation


def test_formats_lists_every_layout() -> None:
    done = run("--formats")
    assert done.returncode == 0
    assert all(layout.name in done.stdout for layout in LAYOUTS)


def test_check_says_the_layout(tmp_path: Path) -> None:
    path = write(tmp_path, *MADE["better_id"].rows)
    done = run("--check", path, "--json", tmp_path / "all.json")
    assert "read as two responses and the number of the better (--layout better_id)" in " ".join(done.stdout.split())
    [found] = json.loads((tmp_path / "all.json").read_text())["files"]
    assert (found["layout"], found["unread"]) == ("better_id", {"columns": {"safer_response_id": 1}, "fields": {}})


def test_the_table_of_the_documentation_is_that_of_the_entries() -> None:
    assert layout_table() in (ROOT / "docs/data.md").read_text("utf-8")
