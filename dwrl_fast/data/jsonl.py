"""JSON lines in UTF-8, one object per line, plain or compressed (detected from the content, not from the name)."""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dwrl_fast.data.compression import kind_of, lines_of, opened, unreadable
from dwrl_fast.data.row_source import START, Position, Row
from dwrl_fast.errors import DataError

BOM = b"\xef\xbb\xbf"


class JsonLines:
    """A RowSource. Only \
     ends a line, because strings may contain U+2028 and similar characters. Blank lines are skipped.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on, each parsed or with its error. Raises DataError if the file cannot be read
        further.
        """
        for raw, after in self.lines(start):
            yield Row(after.line, _parse(raw, f"{self.name}:{after.line}"), after)

    def lines(self, start: Position = START) -> Iterator[tuple[bytes, Position]]:
        """The same rows as bytes, and the position after each. Raises DataError like `rows`."""
        line, offset = start
        kind = None
        try:
            kind = kind_of(self.path)
            with opened(self.path, offset) as file:
                for raw in lines_of(file, self.name, line):
                    line += 1
                    offset += len(raw)
                    if not raw.isspace():
                        yield raw, Position(line, offset)
        except (EOFError, OSError, zlib.error) as error:
            raise unreadable(error, self.name, line, kind) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys: the json module would silently keep the last one."""
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = repr(next(key for key in keys if keys.count(key) > 1))
        shown = twice if len(twice) <= 60 else twice[:57] + "..."
        raise DataError(f"the key {shown} occurs twice in one object; remove one of the two")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(raw: bytes, source: str) -> dict[str, Any] | DataError:
    try:
        row = DECODER.decode(raw.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        return DataError(f"{source}: not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return DataError(
            f"{source}: not JSON ({error.msg} at character {error.pos}); each line must be one object, and the file "
            "must not be an array"
        )
    except DataError as error:  # from _object
        return DataError(f"{source}: {error}")
    except (ValueError, RecursionError) as error:
        return DataError(f"{source}: JSON that cannot be read ({error}); remove the line")
    return as_object(row, source)


def as_object(row: Any, source: str) -> dict[str, Any] | DataError:
    """The row, or a DataError if it is not an object."""
    if isinstance(row, DataError):
        return row
    if not isinstance(row, dict):
        return DataError(f"{source}: a {type(row).__name__} where an object was expected; each line must be one object")
    return row


def finite(value: Any) -> Any:
    """Replace inf and nan by null at any depth, because JSON has neither."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
