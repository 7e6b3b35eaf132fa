"""What the commands share on a terminal: logging, and user errors that are printed without a traceback."""

import logging
import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler

from dwrl_fast.errors import ConfigError, UserError
from dwrl_fast.log import logger


def set_up_logging(console: Console) -> None:
    """Send the package's log messages through `console`, so that they do not cut through the progress bars."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [RichHandler(console=console, show_path=False, show_time=False, markup=False, highlighter=None)]


def command(main: Callable[[list[str]], None]) -> None:
    """Run a command's `main` with the arguments of the command line.

    A UserError ends the process with the error's status and prints only its message. An interrupt ends it with 130.
    """
    try:
        refuse_processes()
        main(sys.argv[1:])
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def refuse_processes() -> None:
    """Raise ConfigError where torchrun, or a launcher like it, started several processes."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"WORLD_SIZE = {processes}: torchrun with more than one process is not supported yet, for each of them "
            "would do the whole work. Start the command as one process, by python -m; CUDA_VISIBLE_DEVICES=N chooses "
            "its GPU."
        )
