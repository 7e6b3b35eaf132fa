"""A lock that lets only one process at a time write to a folder. It is released when the process ends, however it
ends.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dwrl_fast.errors import ConfigError
from dwrl_fast.log import logger

LOCK = ".lock"


def hold(file: IO[bytes], folder: Path, what: str) -> None:
    """Lock `file`, which is open for writing, until it is closed. what: what is written into `folder`, in words.

    Raises ConfigError if another process holds the lock. Warns if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another process is writing {what} into {folder}: wait for it, or name another --output_dir"
        ) from None
    except OSError as error:
        logger.warning(
            "%s cannot be locked here (%s): make sure that no other process writes there.", folder, error.strerror
        )


@contextmanager
def sole_writer(folder: Path, what: str) -> Iterator[None]:
    """A context in which this process alone writes `what` (in words) into `folder`, which must exist.

    Raises ConfigError if another process is already writing there, or if the folder is not writable.
    """
    try:
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder} cannot be written to ({error.strerror}): name another folder"
        ) from None
    with file:
        hold(file, folder, what)
        yield
