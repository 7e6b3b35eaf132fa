"""One JSON array with an object a row, read piece by piece."""

import codecs
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwrl_fast.data.compression import MOST, PIECE, kind_of, opened, too_long, unreadable
from dwrl_fast.data.jsonl import DECODER, as_object
from dwrl_fast.data.row_source import START, Position, Row
from dwrl_fast.errors import DataError

BLANK = " \t\r\n"
NEAR = 16  # characters: an error that is nearer to the end of what was read may be none


class JsonArray:
    """A RowSource. Rows are numbered as the elements are."""

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError where nothing more can be read."""
        line = 0
        try:
            for line, values in enumerate(self._elements(), start=1):
                if line > start.line:
                    yield Row(line, values, Position(line))
        except DataError:
            raise
        except json.JSONDecodeError as error:
            raise self._broken(line, f"not JSON: {error.msg}") from None
        except UnicodeDecodeError as error:
            raise self._broken(line, f"not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise self._broken(line, f"JSON that cannot be read ({error})") from None

    def _elements(self) -> Iterator[dict[str, Any] | DataError]:
        text, line = Growing(self._pieces()), 0
        text.ahead()
        text.at += 1  # the bracket
        while (sign := text.ahead()) != "]":
            if line:
                if sign != ",":
                    raise self._broken(line, f"{sign!r} where a comma was expected" if sign else "the array has no end")
                text.at += 1
                text.ahead()
            line += 1
            yield text.element(f"{self.name}:{line}")
        text.at += 1
        if text.ahead():
            raise self._broken(line, "there is text after the end of the array")

    def _pieces(self) -> Iterator[str]:
        kind = None
        decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        try:
            kind = kind_of(self.path)
            with opened(self.path) as file:
                while piece := file.read(PIECE):
                    yield decode(piece)
        except (EOFError, OSError, zlib.error) as error:
            raise unreadable(error, self.name, 0, kind) from error
        yield decode(b"", final=True)

    def _broken(self, line: int, what: str) -> DataError:
        return DataError(f"{self.name}:{line + 1}: {what}; fix the array here; nothing after this point can be read")


class Growing:
    """The part of a text that is looked at, from `at` on; more of it is read as it is needed."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces, self.text, self.at = pieces, "", 0

    def ahead(self) -> str:
        """The next character that is no blank, at which it then stands; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def element(self, source: str) -> dict[str, Any] | DataError:
        """The JSON value that begins here, as a row; it then stands behind it. Raises ValueError, RecursionError."""
        while True:
            try:
                try:
                    value, end = DECODER.raw_decode(self.text, self.at)
                except DataError as error:  # a key that stands twice
                    value, end = DataError(f"{source}: {error}"), json.JSONDecoder().raw_decode(self.text, self.at)[1]
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - NEAR
                if not cut or not self._grow():
                    raise
                if len(self.text) - self.at > 2 * MOST:
                    raise too_long(source) from None
        self.at = end
        return as_object(value, source)

    def _grow(self) -> bool:
        """Forget what was read, and read as much again as is left, so that a long element is not tried too often."""
        pieces = [self.text[self.at :]]
        wanted = len(pieces[0])
        before = wanted
        for piece in self.pieces:
            pieces.append(piece)
            wanted -= len(piece)
            if wanted < 0:
                break
        self.text, self.at = "".join(pieces), 0
        return len(self.text) > before
