"""What all commands share on a terminal: logging, and user errors without a traceback."""

import errno
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.segment import Segment

from dwrl_fast.errors import ConfigError, Stopped, UserError
from dwrl_fast.log import escaped, logger
from dwrl_fast.ranks import culprit, stop

GRACE = 5  # seconds
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ESTALE}


class Terminal(Console):
    """The console of a command. Texts from files cannot control it: their control characters are escaped, and square
    brackets are no markup. If the reader of the output is gone (`| head`), the command continues without printing,
    because the files that it writes matter more.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As in the base class, with all control characters escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_console(*, highlight: bool = True) -> Console:
    """The console of a command. With several ranks only the first one prints, because all would print the same."""
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        warnings.simplefilter("ignore")
    console = Terminal(quiet=not first, highlight=highlight)
    set_up_logging(console)
    return console


def set_up_logging(console: Console) -> None:
    """Send the package's log messages through `console`, so that they do not break the progress bars."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [RichHandler(console=console, show_path=False, show_time=False, markup=False, highlighter=None)]


def command(main: Callable[[list[str]], None], *, ranks: bool = False) -> None:
    """Run a command's `main` with the arguments of the command line. ranks: whether torchrun may start several
    processes of it.

    A UserError ends the process with the error's status and prints only its message; a disk that refuses a file does
    the same. SIGINT ends the process with status 130, SIGTERM with 143. With several ranks, the rank that fails first
    prints the reason; the others fail because they lose the connection to it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        if not ranks:
            refuse_processes()
        main(sys.argv[1:])
        if ranks and "RANK" in os.environ:
            stop()
            _end(0)  # gloo's threads sometimes abort a process that exits normally
    except UserError as error:
        _leave(error.status, f"\nerror: {error}")
    except KeyboardInterrupt as error:
        _leave(getattr(error, "status", 130), f"\n{error or 'interrupted'}")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            where = f"{error.filename}: " if error.filename else ""
            _leave(2, f"\nerror: {where}{error.strerror}. Free disk space there or make it writable, then try again.")
        if "RANK" not in os.environ:
            raise
        _leave(1, f"{_failure(error)}\n{traceback.format_exc()}")


def _failure(error: Exception) -> str:
    rank = os.environ["RANK"]
    if isinstance(error, RuntimeError) and "onnection" in str(error):
        return (
            f"rank {rank} lost the connection to another rank, which ended without an error message (it was killed or "
            "ran out of memory; torchrun reports the signal)."
        )
    return f"rank {rank} failed, and the other ranks stop with it:"


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def _leave(status: int, why: str) -> NoReturn:
    """End the process. With several ranks it ends at once, because threads of pending collectives would keep it
    alive.
    """
    rank = os.environ.get("RANK")
    if rank is None:
        print(escaped(why), file=sys.stderr)
        sys.exit(status)
    if int(rank) == culprit():
        print(escaped(why), file=sys.stderr)
    else:
        time.sleep(GRACE)  # torchrun reports the first process that ends as the cause, and ends the others
    _end(status)


def _end(status: int) -> NoReturn:
    """End the process at once, without waiting for other threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def refuse_processes() -> None:
    """Raise ConfigError if torchrun, or a similar launcher, started several processes."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"WORLD_SIZE = {processes}: only dwrl_fast.train and dwrl_fast.doctor run as several processes; here each "
            "process would do the whole work. Start one process with python -m; CUDA_VISIBLE_DEVICES=N selects its "
            "GPU."
        )
