"""JSON lines, plain or compressed (told by content, not by name): one object a line, UTF-8."""

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from dwrl_fast.data.compression import kind_of, opened, unreadable
from dwrl_fast.data.row_source import START, Position, Row
from dwrl_fast.errors import DataError

SPACED = re.compile(rb'"[ \t\r]+:')  # a key with blanks before its colon, or what looks like one
INTEGERS = 2.0**63  # what orjson reads as integers is smaller
BOM = b"\xef\xbb\xbf"


class JsonLines:
    """A RowSource. Only \\n ends a line, for strings may hold U+2028 and its like; blank lines are passed over."""

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on, parsed or with what is wrong. Raises DataError where the file cannot be read on."""
        for raw, after in self.lines(start):
            values = _quick(raw)
            yield Row(after.line, _parse(raw, f"{self.name}:{after.line}") if values is None else values, after)

    def lines(self, start: Position = START) -> Iterator[tuple[bytes, Position]]:
        """The same rows as they stand in the file, and the position behind each. Raises DataError as `rows` does."""
        line, offset = start
        kind = None
        try:
            kind = kind_of(self.path)
            with opened(self.path, offset) as file:
                for raw in file:
                    line += 1
                    offset += len(raw)
                    if not raw.isspace():
                        yield raw, Position(line, offset)
        except (EOFError, OSError, zlib.error) as error:
            raise unreadable(error, self.name, line, kind) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json would keep the last of equal keys and say nothing."""
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = repr(next(key for key in keys if keys.count(key) > 1))
        shown = twice if len(twice) <= 60 else twice[:57] + "..."
        raise DataError(f"the key {shown} stands twice in one object; remove one of the two")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _quick(raw: bytes) -> dict[str, Any] | None:
    """The row, where nothing about the line needs a closer look, at a third of the time; else None.

    orjson keeps the last of equal keys, as json does, and reads a large integer as a float. So the keys are counted,
    and a line where the count could be wrong is left to `_parse`.
    """
    try:
        row = orjson.loads(raw)
        keys = raw.count(b'":') - raw.count(b'\\":')
        if type(row) is not dict or SPACED.search(raw) or b'\\\\"' in raw or keys != _keys(row):
            return None
    except (orjson.JSONDecodeError, RecursionError):
        return None
    return None if any(type(value) is float and abs(value) >= INTEGERS for value in row.values()) else row


def _keys(value: Any) -> int:
    """How many keys its objects have, however deep."""
    count = 0
    if type(value) is dict:
        count, value = len(value), value.values()
    for each in value:
        if type(each) is dict or type(each) is list:
            count += _keys(each)
    return count


def _parse(raw: bytes, source: str) -> dict[str, Any] | DataError:
    try:
        row = DECODER.decode(raw.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        return DataError(f"{source}: not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return DataError(
            f"{source}: not JSON ({error.msg} at character {error.pos}); each line must be one object, the file no"
            " array"
        )
    except DataError as error:  # of _object
        return DataError(f"{source}: {error}")
    except (ValueError, RecursionError) as error:
        return DataError(f"{source}: JSON that cannot be read ({error}); remove the line")
    return as_object(row, source)


def as_object(row: Any, source: str) -> dict[str, Any] | DataError:
    """A row as it must be."""
    if isinstance(row, DataError):
        return row
    if not isinstance(row, dict):
        return DataError(f"{source}: a {type(row).__name__} where an object was expected; each line must be one object")
    return row


def finite(value: Any) -> Any:
    """JSON has no inf and no nan: null stands for them, however deep."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
