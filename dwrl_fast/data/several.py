"""Several files as one source, and files that can be read only once."""

import atexit
import functools
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dwrl_fast.data.row_source import START, Position, Row, RowSource
from dwrl_fast.errors import DataError
from dwrl_fast.log import logger

STANDARD_INPUT = "-"


class Several:
    """A RowSource over other sources, one after the other. Row numbers continue from file to file."""

    def __init__(self, name: str, sources: Sequence[RowSource]) -> None:
        self.name, self.sources = name, sources
        self.table = all(getattr(source, "table", False) for source in sources)

    def rows(self, start: Position = START) -> Iterator[Row]:
        """The rows from `start` on. Raises DataError."""
        number = 0
        for source in self.sources:
            for row in source.rows():
                number += 1
                if number > start.line:
                    yield Row(number, row.values, Position(number), f"{source.name}:{row.line}")


def is_pipe(name: str) -> bool:
    """Whether `name` is standard input or a named pipe, which can be read only once."""
    try:
        return name == STANDARD_INPUT or stat.S_ISFIFO(os.stat(name).st_mode)
    except (OSError, ValueError):
        return False


@functools.cache
def spooled(name: str) -> Path:
    """A temporary file with the content of a pipe; it is removed at exit. Raises DataError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DataError(
            f"{name}: a pipe can be read only once, but there are several processes; write it to a file first"
        )
    handle, path = tempfile.mkstemp(prefix="dwrl_fast_", suffix=".piped")
    atexit.register(Path(path).unlink, missing_ok=True)
    try:
        with open(handle, "wb") as out:
            if name == STANDARD_INPUT:
                shutil.copyfileobj(sys.stdin.buffer, out)
            else:
                with open(name, "rb") as pipe:
                    shutil.copyfileobj(pipe, out)
            size = out.tell()
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    logger.info("%s: read once, %s bytes", "standard input" if name == STANDARD_INPUT else name, f"{size:,}")
    return Path(path)
