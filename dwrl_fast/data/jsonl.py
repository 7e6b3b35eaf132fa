"""Preferences from JSON lines, plain or gzipped. Covered: the pair format; one file, read as a whole."""

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dwrl_fast.data.pairs import COLUMNS, Unusable, pair
from dwrl_fast.data.preference import Dataset
from dwrl_fast.errors import DataError

GZIP = b"\x1f\x8b"


def read_preferences(
    path: str | Path, *, columns: Mapping[str, str] | None = None, limit: int | None = None
) -> Dataset:
    """The preferences in a JSONL file (gzipped or not), with TRL's pair columns; the first `limit` usable ones.

    `columns` maps our column names to the file's. Rows that hold no comparison are dropped, counted, with their lines.
    Raises DataError, naming file and line, where the file or a row is not of the form, or no row is left.
    """
    columns = dict(columns or {})
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"there are {', '.join(COLUMNS)}"
            raise DataError(f"--columns {name}={columns[name]}: there is no column {name!r} to fill; {hint}")
    dataset = Dataset(str(path))
    for line, row in read_rows(path):
        try:
            dataset.rows.append(pair(row, f"{path}:{line}", columns))
        except Unusable as reason:
            dataset.dropped.add(str(reason), line)
        if len(dataset.rows) == limit:
            break
    if not dataset.rows:
        raise DataError(f"no usable row: {dataset.summary}")
    return dataset


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of each line that is not blank. Only \\n ends a line: strings may hold U+2028."""
    line = 0
    try:
        with _open(path) as file:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    yield line, _parse(raw, f"{path}:{line}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}:{line + 1}: the gzip file is cut off or damaged here ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open(path: str | Path) -> IO[bytes] | gzip.GzipFile:
    with open(path, "rb") as file:
        start = file.read(2)
    return gzip.open(path) if start == GZIP else open(path, "rb")


def _parse(raw: bytes, source: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: not JSON ({error.msg} at character {error.pos}); each line must be one object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: JSON that cannot be read ({error}); remove the line") from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: a {type(row).__name__} where an object was expected; each line must be one object")
    return row
