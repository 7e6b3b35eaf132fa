"""Sources of rows: a file or data set yields its rows one by one, in constant memory, from any position."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from dwrl_fast.errors import DataError


class Position(NamedTuple):
    """A position in a source: the number of rows (JSON lines: lines) and of bytes before it.

    offset: bytes of the uncompressed file for JSON lines; 0 for other sources.
    """

    line: int = 0
    offset: int = 0


START = Position()


class Row(NamedTuple):
    """One row: its line (or number) from 1, its columns or an error, and the position after it. place: its FILE:LINE if
    the source consists of several files.
    """

    line: int
    values: dict[str, Any] | DataError
    after: Position
    place: str = ""


class RowSource(Protocol):
    """Rows of one file or data set. `rows` may be called several times; each call starts again."""

    name: str  # as given by the user; messages and Preference.source begin with it

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError if the source cannot be read further."""
