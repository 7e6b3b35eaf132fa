"""Files, folders and the hub give the same rows, lazily, from any position. Unreadable sources raise DataError."""

import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console
from tiny import tiny_dialog

from dwrl_fast.data import START, Position, Reader, Row, RowSource, open_rows, read_preferences
from dwrl_fast.errors import DataError
from dwrl_fast.evaluation.rewardbench import read_best_of
from dwrl_fast.feed import open_feed, read_rows
from dwrl_fast.progress import Display

ROWS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"What is {i}\u2028?"}],
        "responses": [f"{i} \U0001f600", "No.", f"{i + 1}"][: 2 + i % 2],
        "ranks": [1, 2, 3][: 2 + i % 2],
        "aspect": "truth" if i % 3 else None,
    }
    for i in range(200)
]


def jsonl(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")
    return str(path)


def gzipped(folder: Path) -> str:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    return str(path)


def parquet_file(folder: Path) -> str:
    path = folder / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=70)
    return str(path)


def hugging_face() -> Any:
    return pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets)")


def saved(folder: Path) -> str:
    data = hugging_face().Dataset.from_list(ROWS)
    data.set_format("numpy")
    data.save_to_disk(folder / "saved")
    return str(folder / "saved")


def saved_split(folder: Path) -> str:
    datasets = hugging_face()
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data.select(range(3)), test=data).save_to_disk(folder / "splits")
    return f"{folder / 'splits'}:test"


SOURCES: dict[str, Callable[[Path], str]] = {
    "jsonl": jsonl,
    "gzip": gzipped,
    "parquet": parquet_file,
    "saved": saved,
    "saved split": saved_split,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_rows_from_any_position(tmp_path: Path, kind: str) -> None:
    source = open_rows(SOURCES[kind](tmp_path))
    found = list(source.rows())
    assert [row.values for row in found] == ROWS
    step = 2 if kind == "jsonl" else 1  # blank lines count
    assert [row.line for row in found] == list(range(1, step * len(ROWS) + 1, step))
    assert [row.after.line for row in found] == [row.line for row in found]
    for i in (0, 1, 63, 64, 69, 70, 141, 198, 199):
        assert list(source.rows(found[i].after)) == found[i + 1 :]
    assert list(source.rows(START)) == found


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_is_read_as_the_same_preferences(tmp_path: Path, kind: str) -> None:
    name = SOURCES[kind](tmp_path)
    dataset = read_preferences(name)
    assert (dataset.used, len(dataset.rows), dataset.path) == (200, 400, name)
    assert dataset.rows[1].responses == ("1 \U0001f600", "No.")
    assert dataset.rows[1].source == f"{name}:{3 if kind == 'jsonl' else 2}:1-2"
    assert dataset.rows[1].lines == (3 if kind == "jsonl" else 2,)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/set", ("owner/set", None, "train")),
        ("owner/set:test", ("owner/set", None, "test")),
        ("owner/set:main:test", ("owner/set", "main", "test")),
        ("squad", ("squad", None, "train")),
    ],
)
def test_the_hub_is_streamed_and_runs_no_code(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, str | None, str]
) -> None:
    datasets = hugging_face()
    calls: list[Any] = []

    def load_dataset(repository: str, config: str | None, **options: Any) -> Any:
        calls.append((repository, config, options))
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_rows(name)
    assert [row.values for row in source.rows(Position(195))] == ROWS[195:]
    assert next(iter(source.rows(Position(195)))).line == 196
    assert source.name == name
    repository, config, split = expected
    assert calls[0] == (repository, config, {"split": split, "streaming": True})  # and no trust_remote_code


@pytest.mark.parametrize("name", ["owner/absent", "absent", "absent:test"])
def test_what_is_neither_here_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    datasets = hugging_face()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(
        DataError, match=rf"^{name}: cannot be read \(ConnectionError: no route\); there is no such file"
    ):
        read_preferences(name)


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/absent/too", "a b", "absent.parquet", "a:b:c:d"])
def test_what_can_only_be_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"absent.*|a b|a:b:c:d: cannot be read \(No such file or directory\); check"):
        read_preferences(name)


@pytest.mark.parametrize(("kind", "module"), [("parquet", "pyarrow.parquet"), ("saved", "datasets")])
def test_a_missing_library_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, module: str
) -> None:
    name = SOURCES[kind](tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{name}: reading it needs .*; run `pip install {module.partition('.')[0]}`"):
        read_preferences(name)


def test_parquet_is_known_by_its_content_and_damage_is_said(tmp_path: Path) -> None:
    path = Path(parquet_file(tmp_path))
    whole = path.read_bytes()
    other = tmp_path / "rows.data"
    other.write_bytes(whole)
    assert len(read_preferences(other).rows) == 400
    flipped = whole[:200] + bytes(byte ^ 255 for byte in whole[200:600]) + whole[600:]
    for content in (whole[: len(whole) // 2], whole[:4], flipped, whole[:-4] + b"PAR2"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"rows.parquet: cannot be read \(.*; fetch it again"):
            read_preferences(path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: it is a folder that datasets.save_to_disk did not write"):
        read_preferences(tmp_path)
    both = saved_split(tmp_path).removesuffix(":test")
    with pytest.raises(DataError, match=r"splits: the folder holds the splits train, test; name one .* FOLDER:train"):
        read_preferences(both)
    with pytest.raises(DataError, match="splits:dev: the folder holds the splits train, test"):
        read_preferences(f"{both}:dev")
    one = saved(tmp_path)
    with pytest.raises(DataError, match="saved:train: the folder holds one data set without splits; leave :train out"):
        read_preferences(f"{one}:train")
    next(Path(one).glob("*.arrow")).write_bytes(b"ARROW1")
    with pytest.raises(DataError, match=r"saved: cannot be read \(.*; fetch it again"):
        read_preferences(one)


def test_reading_is_lazy_and_in_constant_memory(tmp_path: Path) -> None:
    row = {"prompt": "p" * 1000, "chosen": "c" * 1000, "rejected": "r" * 1000}
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for _ in range(5000):
            file.write(json.dumps(row) + "\n")
        file.write("{")
    reader = Reader(open_rows(path))
    read = reader.read()
    assert next(read).preferences
    assert reader.format is not None
    tracemalloc.start()
    try:
        *_, last = (outcome.error for outcome in read)
        assert tracemalloc.get_traced_memory()[1] < 300_000  # of 15 MB
    finally:
        tracemalloc.stop()
    assert isinstance(last, DataError)


def test_outcomes_go_on_from_any_position(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1] | {"ranks": [3, 3, 1]}, ROWS[2] | {"ranks": "1 2"}, ROWS[3]]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    reader = Reader(open_rows(path))
    outcomes = list(reader.read())
    assert [len(outcome.preferences) for outcome in outcomes] == [1, 0, 0, 3]
    assert [bool(outcome.dropped) for outcome in outcomes] == [False, True, False, False]
    assert str(outcomes[2].error) == f"{path}:3: 'ranks' should hold a list, not the str '1 2'"
    for i, outcome in enumerate(outcomes):
        rest = [
            found._replace(error=None) for found in reader.read(outcome.after)
        ]  # errors are equal to themselves only
        assert rest == [found._replace(error=None) for found in outcomes[i + 1 :]]


def test_any_source_will_do() -> None:
    class Memory(RowSource):
        name = "memory"

        def rows(self, start: Position = START) -> Iterator[Row]:
            for i, values in enumerate(ROWS[start.line :], start=start.line + 1):
                yield Row(i, values, Position(i))

    assert sum(len(outcome.preferences) for outcome in Reader(Memory()).read()) == 400


def read_by_each_command(name: str) -> Iterator[Callable[[], Any]]:
    from dwrl_fast import compare, evaluate, train
    from dwrl_fast.data import __main__ as data
    from dwrl_fast.dialog import __main__ as dialog

    model = ["--model_name_or_path", "m"]
    yield lambda: read_preferences(name)
    yield lambda: data.check_one(name, data.DataConfig(check=(name,)), data.Console(), None)
    yield lambda: dialog.read_row(dialog.ShowConfig(show=f"{name}:1", tokenizer_name_or_path="t"), None)
    for config in (
        train.configure([*model, "--dataset_name", name, "--output_dir", "o"]),
        train.configure([*model, "--dataset_mixture", f"{name}:1", "b.jsonl:1", "--output_dir", "o"]),
        train.configure([*model, "--dataset_name", name, "--streaming", "--max_steps", "1", "--output_dir", "o"]),
    ):
        yield lambda config=config: open_feed(config, tiny_dialog(), Display(Console()))  # type: ignore[misc]
    for asked in (
        evaluate.parse_evaluate([*model, "--dataset_name", name]),
        evaluate.parse_evaluate([*model, "--dataset_name", name, "--benchmark", "rewardbench2"]),
        compare.parse_compare(["a", "b", "--dataset_name", name]),
    ):
        read = read_best_of if getattr(asked, "benchmark", None) == "rewardbench2" else None
        yield lambda config=asked, read=read: read_rows(  # type: ignore[misc]
            config.dataset_name, config, tiny_dialog(), Display(Console()), read=read
        )


@pytest.mark.parametrize("name", ["pandas", "pandas:train", "pandas:default:train"])
def test_the_name_of_a_reader_of_datasets_is_refused_and_nothing_is_unpickled(unpickling: Path, name: str) -> None:
    for read in read_by_each_command(name):
        with pytest.raises(DataError, match=rf"^{name}: cannot be read: pandas is a file reader of the `datasets`"):
            read()
    assert not unpickling.exists()
    with pytest.raises(Exception):  # noqa: B017 - whatever comes of it, the code was run: the pickle is a real one
        list(hugging_face().load_dataset("pandas", data_files="data.pkl", streaming=True, split="train"))
    assert unpickling.exists()


def test_every_reader_of_datasets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = pytest.importorskip("datasets.packaged_modules")._PACKAGED_DATASETS_MODULES
    for name in {*table, "json", "csv", "parquet", "text", "arrow", "generator", "sql", "spark", "cache"}:
        with pytest.raises(DataError, match=f"^{name}: cannot be read: {name} is a file reader"):
            open_rows(name)


def test_a_folder_is_not_taken_for_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    jsonl(tmp_path / "mine")
    with pytest.raises(DataError, match=r"^mine:default:train: cannot be read: mine is a folder: name it"):
        read_preferences("mine:default:train")
