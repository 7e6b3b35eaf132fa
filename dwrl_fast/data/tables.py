"""Rows of Parquet files and of Hugging Face data sets, on disk or on the hub. Code that comes with data is never run.

pyarrow and datasets are imported only when such a source is read.
"""

import importlib
import itertools
import json
import os
import pkgutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwrl_fast.data.compression import MOST
from dwrl_fast.data.messages import from_text
from dwrl_fast.data.parquet_pages import largest_value
from dwrl_fast.data.row_source import START, Position, Row
from dwrl_fast.errors import DataError
from dwrl_fast.files import opened

BATCH = 64  # rows converted to Python objects at once
PAGES = 2 * MOST  # maximum bytes of one page of every column together
BUFFER = 1 << 20  # bytes read at once
REMEDY = "fetch it again, or name another"


class Parquet:
    """A RowSource over one Parquet file. A few pages at a time are in memory."""

    table = True

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError."""
        parquet = library("pyarrow.parquet", self.name)
        with readable(self.name), parquet.ParquetFile(self.path, buffer_size=BUFFER, pre_buffer=False) as file:
            decoders = _decoders(file.schema_arrow, self.name)
            largest = _largest(self.path, file, self.name)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            first = bisect_right(list(itertools.accumulate(sizes)), start.line)  # earlier row groups are skipped
            before = sum(sizes[:first])
            batches = file.iter_batches(max(1, min(BATCH, PAGES // largest)), row_groups=range(first, len(sizes)))
            tables = _checked(batches, before, self.name)
            rows = (_decoded(row, decoders) for table in tables for row in table.to_pylist())
            yield from _numbered(rows, before, start)


class SavedDataset:
    """A RowSource over a folder that `datasets` wrote (save_to_disk). It is memory-mapped, not loaded."""

    table = True

    def __init__(self, folder: Path, name: str, split: str | None) -> None:
        self.name, self.folder, self.split = name, folder, split

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError."""
        datasets = library("datasets", self.name)
        with readable(self.name):
            data = datasets.load_from_disk(str(self.folder))
            if isinstance(data, Mapping):
                data = _split(data, self.split, self.name)
            elif self.split is not None:
                raise DataError(f"{self.name}: the folder holds one data set without splits; leave :{self.split} out")
            data = data.with_format(None)  # a saved format would give tensors or arrays
            if start.line < len(data):
                data = data.select(range(start.line, len(data)))
                tables = _checked(data.with_format("arrow"), start.line, self.name)
                yield from _numbered((row for _, row in zip(tables, data, strict=True)), start.line, start)


class HubDataset:
    """A RowSource over a data set of the Hugging Face hub, read while it is downloaded. `name` is NAME[:CONFIG]:SPLIT.
    Raises DataError if `datasets` would read local files for NAME.
    """

    table = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.repository, *rest = name.split(":")
        _refuse_local(self.repository, name)
        self.split = rest[-1] if rest else "train"
        self.config = rest[0] if len(rest) > 1 else None

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError."""
        datasets = library("datasets", self.name)
        with readable(
            self.name,
            "there is no such file; if NAME:SPLIT or NAME:CONFIG:SPLIT is a data set of the hub, check that this "
            "machine can reach the hub",
        ):
            data = datasets.load_dataset(self.repository, self.config, split=self.split, streaming=True)
            rows = ({name: from_text(value) for name, value in row.items()} for row in data.skip(start.line))
            yield from _numbered(rows, start.line, start)


def _largest(path: str | Path, file: Any, name: str) -> int:
    """An upper bound of the bytes of a row of a Parquet file. Raises DataError if it is more than PAGES."""
    depths = [file.schema.column(k).max_repetition_level for k in range(len(file.schema))]
    largest = 1
    with opened(path) as raw:
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            columns = list(map(group.column, range(group.num_columns)))
            sizes = [largest_value(raw, column, depth, PAGES) for column, depth in zip(columns, depths, strict=True)]
            largest = max(largest, sum(sizes))
            if sum(sizes) > PAGES:
                place = max(range(len(sizes)), key=sizes.__getitem__)
                raise DataError(
                    f"{name}: up to {sizes[place] >> 20:,} MiB in one value of the column "
                    f"'{columns[place].path_in_schema}', and no row may have more than {MOST >> 20}: write the file "
                    "without it. If no value is that large, the pages of the file are: write it with smaller pages, in "
                    "pyarrow with write_table(..., write_batch_size=16)"
                )
    return largest


def _checked(tables: Iterable[Any], before: int, name: str) -> Iterator[Any]:
    """Arrow's tables or batches unchanged, from row `before` + 1 on. Raises DataError if a row is too large."""
    for table in tables:
        if table.nbytes > MOST:
            for place in range(len(table)):
                if table.slice(place, 1).nbytes > MOST:
                    raise DataError(
                        f"{name}:{before + place + 1}: a row of more than {MOST >> 20} MiB; write the file without it"
                    )
        before += len(table)
        yield table


Decode = Callable[[Any], Any]


def _decoders(schema: Any, name: str) -> dict[str, Decode]:
    """For each column that holds JSON as text at any depth, the function that decodes it. Raises DataError if two
    columns have the same name.
    """
    if twice := next((column for column in schema.names if schema.names.count(column) > 1), None):
        raise DataError(
            f"{name}: the column name '{twice}' occurs {schema.names.count(twice)} times, but a row has one value per "
            "name; rename one of the columns"
        )
    found = ((field.name, _decoder(field.type)) for field in schema)
    return {column: decode for column, decode in found if decode is not None}


def _decoder(kind: Any) -> Decode | None:
    """The decoder for values of an Arrow type; None if there is nothing to decode."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if hasattr(kind, "value_type"):  # a list
        each = _decoder(kind.value_type)
        return None if each is None else lambda value: value and [each(one) for one in value]
    if hasattr(kind, "fields") and hasattr(kind, "get_field_index"):  # a struct
        inner = {field.name: decode for field in kind.fields if (decode := _decoder(field.type)) is not None}
        return (lambda value: value and _decoded(value, inner)) if inner else None
    return None


def _decoded(row: dict[str, Any], decoders: Mapping[str, Decode]) -> dict[str, Any]:
    for column, decode in decoders.items():
        row[column] = decode(row[column])
    return row


def _refuse_local(repository: str, name: str) -> None:
    """Refuse names for which `datasets` would read local files: the name of one of its file readers (it would read
    files of the working folder) and the name of a local folder. Before version 5.2 the reader "pandas" unpickles, which
    can run code.
    """
    readers = {module.name for module in pkgutil.iter_modules(library("datasets.packaged_modules", name).__path__)}
    if repository in readers:
        raise DataError(
            f"{name}: cannot be read: {repository} is a file reader of the `datasets` package, not a data set. Name "
            "the file, or a data set of the hub with its owner, as in OWNER/NAME"
        )
    if os.path.isdir(repository):
        raise DataError(f"{name}: cannot be read: {repository} is a folder: name it, FOLDER:SPLIT or a file in it")


def _numbered(rows: Iterable[dict[str, Any]], before: int, start: Position) -> Iterator[Row]:
    """Rows with their numbers; rows before `start` are skipped."""
    for number, values in enumerate(rows, start=before + 1):
        if number > start.line:
            yield Row(number, values, Position(number))


def _split(data: Mapping[str, Any], split: str | None, name: str) -> Any:
    if split is not None and split in data:
        return data[split]
    raise DataError(
        f"{name}: the folder holds the splits {', '.join(data)}; name one of them, as in FOLDER:{next(iter(data))}"
    )


@contextmanager
def readable(name: str, remedy: str = REMEDY) -> Iterator[None]:
    """A context that turns every error of reading into a DataError: these libraries raise many kinds of errors."""
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        raise DataError(f"{name}: cannot be read ({type(error).__name__}: {str(error)[:300]}); {remedy}") from error


def library(module: str, name: str) -> Any:
    """Import a module that is needed to read `name`. Raises DataError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{name}: reading it needs {package}; run `pip install {package}`") from error
