"""Texts and JSON. A pipe or a device in place of a file is not waited for, and a large file is not read."""

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MOST = 32 << 20  # bytes
NESTED = 4_000_000  # lists and objects: each takes some hundred bytes of memory


def opened(path: str | Path) -> BufferedReader:
    """A regular file, to be read. OSError where it cannot be, or is a pipe, a device or a folder."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a file name cannot contain a null byte", str(path).replace("\0", "\\0"))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # which a pipe's other end would hold up
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def bounded_text(path: str | Path, most: int = MOST) -> str:
    """The UTF-8 text of a file of at most `most` bytes. OSError as of `opened`, ValueError where it is no such text."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most >> 20} MiB, the limit for such files")
    return data.decode("utf-8")


def bounded_json(path: str | Path, most: int = MOST) -> Any:
    """The value that the file holds. Raises as `bounded_text`; ValueError also for what is no JSON, or nested too
    deeply.
    """
    text = bounded_text(path, most)
    if text.count("[") + text.count("{") > NESTED:
        raise ValueError(f"JSON with more than {NESTED:,} lists and objects, the limit for such files")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
