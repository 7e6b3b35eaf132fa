"""Opens files that may be compressed. The first bytes identify the compression, not the name."""

import bz2
import gzip
import importlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, AnyStr

from dwrl_fast.errors import DataError

KINDS = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}
PIECE = 1 << 20
MOST = 128 << 20  # maximum bytes of a row


def kind_of(path: str | Path) -> str | None:
    """The compression of a file; None if it is not compressed. Raises OSError."""
    if "\0" in str(path):
        raise OSError("embedded null byte")
    with open(path, "rb") as file:
        start = file.read(4)
    return next((kind for kind, magic in KINDS.items() if start.startswith(magic)), None)


def opened(path: str | Path, offset: int = 0) -> IO[bytes]:
    """The uncompressed bytes of the file from `offset` on. In a compressed file, everything before `offset` is read
    too. Raises OSError or DataError.
    """
    kind = kind_of(path)
    opening: Mapping[str | None, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "zstd": _zstd, None: open}
    file: IO[bytes] = opening[kind](path, "rb")
    if kind == "zstd":
        while offset and (skipped := len(file.read(min(offset, PIECE)))):
            offset -= skipped
    else:
        file.seek(offset)
    return file


def lines_of(file: IO[AnyStr], name: str, before: int) -> Iterator[AnyStr]:
    """The lines of a file of bytes or text, of which `before` have been read. Raises DataError at a line that is longer
    than a row may be, without reading it whole: in a compressed file a line may fill a disk.
    """
    for number in itertools.count(before + 1):
        line = file.readline(MOST + 1)
        if len(line) > MOST:
            raise too_long(f"{name}:{number}")
        if not line:
            return
        yield line


def too_long(source: str) -> DataError:
    """The error for the row `source`, which is too long and is not read."""
    return DataError(
        f"{source}: a row of more than {MOST >> 20} MiB; write each row on a line of its own, and leave out this one"
    )


def _zstd(path: str | Path, mode: str) -> IO[bytes]:
    try:
        arrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(f"{path}: reading zstd needs pyarrow; run `pip install pyarrow`") from error
    return io.BufferedReader(arrow.input_stream(str(path), compression="zstd"), PIECE)


def unreadable(error: Exception, name: str, line: int, kind: str | None) -> DataError:
    """The DataError for a failure to read `name` after `line`."""
    if kind is not None and getattr(error, "errno", None) is None:
        return DataError(f"{name}:{line + 1}: the {kind} file is cut off or damaged here ({error}); fetch it again")
    said = getattr(error, "strerror", None) or error
    return DataError(f"{name}: cannot be read ({said}); check the path and its permissions")
