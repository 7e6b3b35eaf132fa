"""Reads one JSON array of objects, one object per row, in pieces."""

import codecs
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwrl_fast.data.compression import MOST, PIECE, kind_of, opened, too_long, unreadable
from dwrl_fast.data.jsonl import DECODER, as_object
from dwrl_fast.data.row_source import START, Position, Row
from dwrl_fast.errors import DataError

BLANK = " \t\r\n"
NEAR = 16  # characters; an error closer to the end of the text read so far may only mean that the text is incomplete


class JsonArray:
    """A RowSource. The number of a row is that of its element, from 1."""

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError if nothing more can be read."""
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
        text.at += 1  # skip the bracket
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
    """A window on a text, from `at` on. More text is read when it is needed."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces, self.text, self.at = pieces, "", 0

    def ahead(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def element(self, source: str) -> dict[str, Any] | DataError:
        """Read the JSON value at the current position as a row, and move behind it. Raises ValueError or
        RecursionError.
        """
        while True:
            try:
                try:
                    value, end = DECODER.raw_decode(self.text, self.at)
                except DataError as error:  # a duplicate key
                    value, end = DataError(f"{source}: {error}"), json.JSONDecoder().raw_decode(self.text, self.at)[1]
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - NEAR
                if cut and len(self.text) - self.at > self._most():
                    raise too_long(source) from None
                if not cut or not self._grow():
                    raise
        self.at = end
        return as_object(value, source)

    def _grow(self) -> bool:
        """Drop the consumed text and double the rest, so that a long element is not parsed too often. A rest that
        becomes longer than a row may be grows no further.
        """
        pieces = [self.text[self.at :]]
        before = len(pieces[0])
        wanted = min(before, self._most() - before)
        for piece in self.pieces:
            pieces.append(piece)
            wanted -= len(piece)
            if wanted < 0:
                break
        self.text, self.at = "".join(pieces), 0
        return len(self.text) > before

    def _most(self) -> int:
        """Maximum characters of a row: Python needs up to four bytes for each."""
        return MOST * len(self.text) // sys.getsizeof(self.text)
