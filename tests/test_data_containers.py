"""Every layout in every container gives the same rows. What a container cannot represent is reported."""

import bz2
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import ROOT
from layout_rows import ASK, MADE, NO, PAIR, YES
from pyarrow import parquet

from dwrl_fast.data import START, Preference, open_rows, read_preferences
from dwrl_fast.data.check import check
from dwrl_fast.errors import DataError
from dwrl_fast.feed.files import StreamedFiles

Rows = list[dict[str, Any]]


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"Why {number}?", **PAIR}


def table(rows: Rows, separator: str) -> bytes:
    """Rows as a text table; values that are not text are written as JSON."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names, delimiter=separator)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else None if v is None else json.dumps(v) for k, v in row.items()})
    return out.getvalue().encode()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


def shards(folder: Path, rows: Rows) -> str:
    for number, row in enumerate(rows):
        (folder / f"part-{number}.jsonl").write_bytes(lines([row]))
    (folder / "README.md").write_text("words")
    return str(folder)


def saved(folder: Path, rows: Rows) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def parquet_file(folder: Path, rows: Rows) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def pipe(folder: Path, content: bytes) -> str:
    path = folder / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
    return str(path)


CONTAINERS: dict[str, Callable[[Path, Rows], str]] = {
    "array": lambda folder, rows: written(folder / "rows.json", json.dumps(rows, indent=1).encode()),
    "array in a line": lambda folder, rows: written(folder / "rows.json", json.dumps(rows).encode()),
    "gzip": lambda folder, rows: written(folder / "rows.jsonl.gz", gzip.compress(lines(rows))),
    "bzip2": lambda folder, rows: written(folder / "rows.jsonl.bz2", bz2.compress(lines(rows))),
    "zstd": lambda folder, rows: written(folder / "rows.jsonl.zst", zstd(lines(rows))),
    "array in zstd": lambda folder, rows: written(folder / "rows.json.zst", zstd(json.dumps(rows).encode())),
    "CSV": lambda folder, rows: written(folder / "rows.csv", table(rows, ",")),
    "TSV in bzip2": lambda folder, rows: written(folder / "rows.tsv.bz2", bz2.compress(table(rows, "\t"))),
    "shards": shards,
    "pattern": lambda folder, rows: shards(folder, rows) + "/part-*.jsonl",
    "pipe": lambda folder, rows: pipe(folder, lines(rows)),
    "CSV through a pipe": lambda folder, rows: pipe(folder, table(rows, ",")),
    "TSV of no name": lambda folder, rows: written(folder / "rows", table(rows, "\t")),
    "parquet": parquet_file,
    "saved": saved,
}


def told(rows: list[Preference]) -> list[tuple[Any, ...]]:
    """Everything except the sources."""
    return [(*row.content[:4], row.source.count("-")) for row in rows]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_layout_in_every_container(tmp_path: Path, container: str, name: str) -> None:
    rows = MADE[name].rows
    rows = rows if MADE[name].together else rows[:1] * 3
    if container == "saved" and name == "content_parts":
        rows = rows[:1]
    expected = read_preferences(written(tmp_path / "lines.data", lines(rows)))
    folder = tmp_path / "in"
    folder.mkdir()
    path = CONTAINERS[container](folder, rows)
    found = read_preferences(path)
    assert [row[:4] for row in told(found.rows)] == [row[:4] for row in told(expected.rows)]
    assert (found.used, found.format, found.dropped) == (expected.used, expected.format, {})
    report = check(path)  # a pipe is read once, whoever asks
    assert (report.used, report.groups) == (expected.used, len(expected.rows))
    source = open_rows(path)
    all_rows = list(source.rows())
    assert list(source.rows(all_rows[0].after)) == all_rows[1:]


def test_standard_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dwrl_fast.data", "--check", "-", "--json", str(tmp_path / "all.json")]
    done = subprocess.run(command, input=lines([pair(i) for i in range(4)]), capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    [found] = json.loads((tmp_path / "all.json").read_text())["files"]
    assert (found["path"], found["used"], found["rows"]) == ("-", 4, 4)


def test_a_pipe_is_refused_where_several_processes_would_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        DataError, match="pipe: a pipe can be read only once, but there are several processes; write it to a file"
    ):
        open_rows(tmp_path / "pipe")


ARRAYS = {
    "cut off": (
        b"[" + lines([pair(1)]) + b', {"prom',
        r":2: not JSON: .*; fix the array here; nothing after this point can be read",
    ),
    "no end": (lines([pair(1)]).replace(b"{", b"[{", 1), ":2: the array has no end; fix the array here"),
    "no comma": (b'[{"prompt": "a", "chosen": "b", "rejected": "c"} {}]', ":2: '{' where a comma was expected; fix"),
    "behind the end": (b"[] []", ":1: there is text after the end of the array; fix"),
    "no object": (json.dumps([pair(1), "a"]).encode(), ":2: a str where an object was expected; each "),
    "key twice": (b'[{"a": 1, "a": 2}]', ":1: the key 'a' occurs twice in one object; remove one"),
    "not UTF-8": (b'[{"prompt": "\xff"}]', r":1: not UTF-8 \(invalid start byte\); fix the array"),
    "too deep": (b'[{"a": ' + b"[" * 100_000, ":1: JSON that cannot be read .*; fix the array"),
    "bad escape": (b'[{"prompt": "\\x"}]', r":1: not JSON: Invalid \\\\?escape"),
    "truncated zstd": (zstd(lines([pair(i) for i in range(999)]))[:-9], r":\d+: the zstd file is cut off or damaged"),
    "truncated bzip2": (bz2.compress(lines([pair(1)]))[:-9], r":\d+: the bzip2 file is cut off or damaged here"),
    "empty array": (b" [ ] ", ": 0 rows read"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    content, message = ARRAYS[kind]
    with pytest.raises(DataError, match=f"rows.json{message}"):
        read_preferences(written(tmp_path / "rows.json", content))


def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [pair(i) | {"chosen": f'{i} \U0001f600\\" ' * (i % 7 * 40 + 1)} for i in range(60)]
    path = written(tmp_path / "rows.json", b"\xef\xbb\xbf \n" + json.dumps(rows, ensure_ascii=False).encode())
    expected = [row.values for row in open_rows(path).rows()]
    assert expected == rows
    for size in (1, 2, 3, 7, 50, 333):
        monkeypatch.setattr("dwrl_fast.data.json_array.PIECE", size)
        assert [row.values for row in open_rows(path).rows()] == rows


def test_an_element_of_an_array_is_no_longer_than_a_row_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more of the file is read, whatever it holds. In memory, wide characters count fourfold."""
    monkeypatch.setattr("dwrl_fast.data.json_array.PIECE", 100)
    monkeypatch.setattr("dwrl_fast.data.json_array.MOST", 10_000)
    path = tmp_path / "rows.json"
    for letter, fits, exceeds in (("a", 9_000, 10_500), ("\U0001f600", 2_200, 2_700)):
        rows = [pair(0), pair(1) | {"prompt": letter * fits}, pair(2)] * 4
        written(path, json.dumps(rows, ensure_ascii=False).encode())
        assert [row.values for row in open_rows(path).rows()] == rows
        rows[7] = pair(1) | {"prompt": letter * exceeds}
        written(path, json.dumps(rows, ensure_ascii=False).encode())
        with pytest.raises(DataError, match=r"rows\.json:8: a row of more than"):
            list(open_rows(path).rows())


TABLES = {
    "cells missing": ("prompt,chosen,rejected\na,b\n", ":2: 2 cells, but 3 column names; put a cell that contains"),
    "name twice": ("prompt,chosen,chosen\na,b,c\n", ":1: the column name 'chosen' occurs 2 times; rename one"),
    "open quote": ('prompt,chosen,rejected\n"a,b,c\n', r":\d: not a valid table of this kind .*; put a cell that"),
    "no number": ("prompt,chosen,rejected,margin\na,b,c,much\n", ":2: 'margin' should hold a number, not the Cell"),
    "no rows": ("prompt,chosen,rejected\n", ": 0 rows read"),
    "nothing": ("", ": 0 rows read"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_bad_tables(tmp_path: Path, kind: str) -> None:
    content, message = TABLES[kind]
    with pytest.raises(DataError, match=f"rows.csv{message}"):
        read_preferences(written(tmp_path / "rows.csv", content.encode()))


def test_cells_are_numbers_lists_and_messages_where_these_are_asked_for(tmp_path: Path) -> None:
    rows = [
        pair(1) | {"margin": 0.5, "chosen": "12", "rejected": "[1, 2]"},
        pair(2) | {"margin": None, "chosen": 'a\nb, "c"', "prompt": [{"role": "user", "content": ASK}]},
    ]
    dataset = read_preferences(written(tmp_path / "rows.csv", table(rows, ",")))
    assert [(row.responses[0], row.margin) for row in dataset.rows] == [("12", 0.5), ('a\nb, "c"', 0.0)]
    assert dataset.rows[0].responses[1] == "[1, 2]" and dataset.rows[1].prompt[0]["content"] == ASK
    assert [row.lines for row in dataset.rows] == [(2,), (3,)]
    ranked = [{"prompt": ASK, "responses": [NO, YES], "scores": [1, 2.5]}]
    assert read_preferences(written(tmp_path / "rows.tsv", table(ranked, "\t"))).rows[0].margin == 1.5


def test_a_null_optional_column_of_a_table_is_an_absent_one(tmp_path: Path) -> None:
    rows = [pair(1) | {"margin": None}, pair(2) | {"margin": 2.0}]
    assert [row.margin for row in read_preferences(parquet_file(tmp_path, rows)).rows] == [0.0, 2.0]
    dataset = read_preferences(written(tmp_path / "rows.jsonl", lines(rows)))  # there it could be left out
    assert dataset.dropped == {"margin is not a finite number": [1]}


def test_sets_are_numbered_through_and_errors_name_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    path = shards(folder, [pair(1), pair(2), pair(3) | {"chosen": 5}])
    with pytest.raises(DataError, match=r"set:3: 'chosen' should hold .* \(.*part-2.jsonl:1\)$"):
        read_preferences(path)
    both = f"{folder}/part-1.jsonl,{folder}/part-0.jsonl"
    assert [row.source for row in read_preferences(both).rows] == [f"{both}:1", f"{both}:2"]
    files = StreamedFiles(path)
    assert len(files.identity["files"]) == 3
    with pytest.raises(DataError, match=r"part-2.jsonl was changed while it was streamed"):
        (folder / "part-2.jsonl").write_text("{}")
        files.verify()


def test_folders_of_several_kinds_or_splits_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        written(tmp_path / name, lines([pair(len(name))]))
    with pytest.raises(DataError, match=r"the folder holds the splits test, train; name a file, or .*\*train\*'"):
        read_preferences(tmp_path)
    assert read_preferences(f"{tmp_path}:train").used == 2
    assert read_preferences(f"{tmp_path}/*train*").used == 2
    with pytest.raises(DataError, match="it has no data files with 'dev' in their names"):
        read_preferences(f"{tmp_path}:dev")
    written(tmp_path / "rows.csv", b"")
    with pytest.raises(DataError, match=r"files of several kinds \(.csv, .jsonl\); name a file, or some of them"):
        read_preferences(tmp_path)


def test_json_text_of_datasets_is_messages_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    turns = ['{"role":"user","content":"Why is it?","language":"English"}']
    rows = [{"prompt": turns, "chosen": '{"role":"assistant","content":"Because."}', "rejected": NO}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(lambda: iter(rows))
    )
    [row] = read_preferences("owner/set").rows
    assert (row.prompt[0]["content"], row.responses) == (ASK, (YES, NO))
    plain = read_preferences(
        written(tmp_path / "rows.jsonl", lines([{"prompt": ASK, "chosen": turns[0], "rejected": NO}]))
    )
    assert plain.rows[0].responses[0] == turns[0]
    [warning] = plain.warnings
    assert warning.startswith("1 x rows with a text that looks like messages written as JSON: it is read as plain text")


def test_start_is_the_beginning(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", table([pair(1)], ","))
    assert len(list(open_rows(path).rows(START))) == 1


def test_the_good_rows_of_a_table_and_of_an_array(tmp_path: Path) -> None:
    rows = [pair(1) | {"margin": 0.5}, pair(2) | {"chosen": ""}, pair(3)]
    array = [*MADE["label_1_2"].rows[:1], {"input": ASK, "output_1": "a", "output_2": "a", "label": 1}, "words"]
    for path in (
        written(tmp_path / "rows.csv", table(rows, ",")),
        written(tmp_path / "rows.json", json.dumps(array).encode()),
    ):
        out = tmp_path / f"{Path(path).suffix[1:]}.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", "dwrl_fast.data", "--check", path, "--fix", out],
            capture_output=True,
            cwd=ROOT,
            check=False,
            text=True,
        )
        assert done.returncode == 0 and "and clean)" in done.stdout, done.stderr
        good, bad = out.read_text(), Path(f"{out}".replace(".jsonl", ".quarantine.jsonl")).read_text()
        assert (good.count("\n"), bad.count("\n")) == ((2, 1) if path.endswith("csv") else (1, 2))
        assert read_preferences(out).used == good.count("\n")


@pytest.mark.parametrize("words", [("true", "false"), ("True", "False")])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_ties_in_a_table(tmp_path: Path, words: tuple[str, str], separator: str) -> None:
    """As JSON and as pandas writes them."""
    lines = ["prompt,chosen,rejected,tie", f"1,7,9,{words[1]}", f"2,7,9,{words[0]}", "3,7,9,"]
    content = "\n".join(lines).replace(",", separator).encode() + b"\n"
    file = tmp_path / ("rows.csv" if separator == "," else "rows.tsv")
    path = written(file, content)
    assert [row.ranks for row in read_preferences(path, ties="keep").rows] == [(), (1, 1), ()]
    assert read_preferences(path).dropped == {"tie (--ties keep would use it)": [3]}
    with pytest.raises(DataError, match=r"'tie' should hold true or false, not the .* 'maybe'"):
        read_preferences(written(file, content.replace(words[0].encode(), b"maybe")))
