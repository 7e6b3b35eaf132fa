"""Runs in forked processes. They share the imports of this process, so hundreds of them are cheap. Also the faults that
end them.
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
    """Start `run` in a forked process, append its output to `log`, and return its id. It ends with 0 if `run` returns,
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
    """Wait for a process. Returns its exit status, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def lived(run: Callable[[], object], log: Path) -> int:
    """Start a process with `life` and wait for it with `ended`."""
    return ended(life(run, log))


def die() -> NoReturn:
    """End this process like SIGKILL, without any cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")


class Boundaries:
    """Calls `strike` before file operation `number` (from 1) of this process under `folder` (open, create, rename,
    remove, sync) while `armed`. With number 0 it only counts, in `count`. There is one instance per process.

    It hooks Python's audit events and os.fsync, so it also sees operations of libraries. Only the thread that writes
    checkpoints is affected.
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
        """The audit hook of Python."""
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
    """Whether a file is opened for writing."""
    _, _, flags = (*arguments, 0, 0)[:3]
    return bool(flags & (os.O_WRONLY | os.O_RDWR))
