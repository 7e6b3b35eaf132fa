"""Lives of a run: processes forked from this one, which has everything imported, so that hundreds cost little; and what
may end them.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync"}


def life(run: Callable[[], object], log: Path) -> int:
    """Begin `run` in a process of its own, whose output is added to `log`; its id. It ends with 0 where `run` returns,
    with the status of a SystemExit, and otherwise with 1.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    _live(run, log)


def _live(run: Callable[[], object], log: Path) -> NoReturn:
    status = 1
    try:
        with log.open("ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(process: int) -> int:
    """Wait for a life; its exit status, or that signal's number below 0 which ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def lived(run: Callable[[], object], log: Path) -> int:
    """A whole life, as `life` and `ended` have it."""
    return ended(life(run, log))


def die() -> NoReturn:
    """End this process as a SIGKILL does: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")


class Boundaries:
    """Calls `strike` before the `number`-th time (from 1) that this process opens, makes, renames, removes or syncs
    something under `folder` while it is `armed`; with number 0 it only counts, in `count`. There is one a process.

    It hooks Python's audit events and os.fsync, so it also sees what libraries do. Only the thread that writes
    checkpoints is struck.
    """

    def __init__(self, folder: Path, number: int, strike: Callable[[], object]):
        self.folder, self.number, self.strike = str(folder), number, strike
        self.armed, self.count = False, 0
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            self.event("fsync", (self.folder,))
            fsync(descriptor)

        setattr(os, "fsync", synced)  # noqa: B010 - mypy takes no assignment to a function of a module
        sys.addaudithook(self.event)

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        """What Python reports before it does something."""
        if not self.armed or name not in EVENTS or threading.current_thread().name != "checkpoint":
            return
        path = str(arguments[0])
        if name == "open" and not (path.startswith(self.folder) and _writes(arguments)):
            return
        self.count += 1
        if self.count == self.number:
            self.armed = False
            self.strike()


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether a file is opened to be written."""
    _, _, flags = (*arguments, 0, 0)[:3]
    return bool(flags & (os.O_WRONLY | os.O_RDWR))
