"""Text tables (CSV or TSV) with the column names in the first line."""

import csv
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwrl_fast.data.compression import MOST, kind_of, lines_of, opened, unreadable
from dwrl_fast.data.messages import from_text
from dwrl_fast.data.row_source import START, Position, Row
from dwrl_fast.data.table_text import Cell
from dwrl_fast.errors import DataError


class Delimited:
    """A RowSource. The number of a row is that of its first line. Cells are text; an empty cell is a null."""

    table = True

    def __init__(self, path: str | Path, separator: str, name: str | None = None) -> None:
        self.path, self.separator, self.name = path, separator, name or str(path)

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError."""
        csv.field_size_limit(MOST)  # the default limit is too small for long texts
        line, kind = 0, None
        try:
            kind = kind_of(self.path)
            with io.TextIOWrapper(opened(self.path), encoding="utf-8-sig", newline="") as file:
                read = csv.reader(lines_of(file, self.name, 0), delimiter=self.separator, strict=True)
                names = self._names(next(read, []))
                for cells in read:
                    number, line = line + 1 if line else 2, read.line_num
                    if cells and number > start.line:
                        yield Row(number, self._values(names, cells, number), Position(number))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
        except csv.Error as error:
            raise DataError(
                f"{self.name}:{line + 1}: not a valid table of this kind ({error}); put a cell that contains "
                "separators, quotes or line breaks in double quotes, and double each quote inside it"
            ) from error
        except (EOFError, OSError, zlib.error) as error:
            raise unreadable(error, self.name, line, kind) from error

    def _names(self, names: list[str]) -> list[str]:
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"{self.name}:1: the column name '{twice}' occurs {names.count(twice)} times; rename one")
        return names

    def _values(self, names: list[str], cells: list[str], number: int) -> dict[str, Any] | DataError:
        if len(cells) != len(names):
            return DataError(
                f"{self.name}:{number}: {len(cells)} cells, but {len(names)} column names; put a cell that contains "
                "separators in double quotes"
            )
        return {name: from_text(Cell(cell)) if cell else None for name, cell in zip(names, cells, strict=True)}
