"""One process writes to a folder at a time: a lock that ends with its process, however that ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dwrl_fast.errors import ConfigError
from dwrl_fast.log import logger

LOCK = ".lock"


def hold(file: IO[bytes], folder: Path, what: str) -> None:
    """Lock `file`, opened for writing, until it is closed. ConfigError where another process holds it; `what` it writes
    into `folder`, in words.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another process is writing {what} into {folder}: wait for it, or name another --output_dir"
        ) from None
    except OSError as error:
        logger.warning(
            "%s cannot be locked here (%s): see to it that no second process writes there.", folder, error.strerror
        )


@contextmanager
def sole_writer(folder: Path, what: str) -> Iterator[None]:
    """Within the block no other process gets past here with the same folder; ConfigError where one is there already."""
    try:
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder} cannot be written to ({error.strerror}): name another folder"
        ) from None
    with file:
        hold(file, folder, what)
        yield
