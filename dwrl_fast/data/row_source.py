"""Where rows come from: a file or data set gives its rows one by one, in constant memory, from any position on."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from dwrl_fast.errors import DataError


class Position(NamedTuple):
    """How far a source is read: the rows (for JSON lines: the lines) before this point, and the bytes they take.

    offset: bytes of the uncompressed file, where the source is JSON lines; 0 elsewhere.
    """

    line: int = 0
    offset: int = 0


START = Position()


class Row(NamedTuple):
    """One row: its line (or number) from 1, its columns or why it has none, and the position behind it. place: its
    FILE:LINE where the source is several files.
    """

    line: int
    values: dict[str, Any] | DataError
    after: Position
    place: str = ""


class RowSource(Protocol):
    """Rows of one file or data set. `rows` starts afresh at each call and may be called several times."""

    name: str  # as the user gave it; messages and Preference.source begin with it

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError where nothing more can be read."""
