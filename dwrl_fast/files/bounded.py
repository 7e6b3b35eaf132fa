"""Text and JSON files. A pipe or a device is refused without waiting, and a large file is not read."""

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
    """Open a regular file for reading. Raises OSError if that is not possible, or if it is a pipe, a device or a
    folder.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a file name cannot contain a null byte", str(path).replace("\0", "\\0"))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would otherwise block
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def bounded_text(path: str | Path, most: int = MOST) -> str:
    """The UTF-8 text of a file of at most `most` bytes. Raises OSError like `opened`, and ValueError if it is too large
    or not UTF-8.
    """
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most >> 20} MiB, the limit for such files")
    return data.decode("utf-8")


def check_size(text: str, most: int = MOST) -> None:
    """Raise ValueError if `bounded_json` would refuse this JSON because of its size. text: ASCII, as from
    `json.dumps`.
    """
    if len(text) > most:
        raise ValueError(f"JSON larger than {most >> 20} MiB, the limit for such files")
    if text.count("[") + text.count("{") > NESTED:
        raise ValueError(f"JSON with more than {NESTED:,} lists and objects, the limit for such files")


def bounded_json(path: str | Path, most: int = MOST) -> Any:
    """The value that the file holds. Raises like `bounded_text`; ValueError also if it is not JSON or is nested too
    deeply.
    """
    text = bounded_text(path, most)
    check_size(text, most)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
