"""What the commands share on a terminal: where messages go, and errors that a person can mend without a traceback."""

import logging
import sys
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler

from dwrl_fast.errors import UserError
from dwrl_fast.log import logger


def set_up_logging(console: Console) -> None:
    """Our messages through `console`, so that they do not cut through the bars."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [RichHandler(console=console, show_path=False, show_time=False, markup=False, highlighter=None)]


def command(main: Callable[[list[str]], None]) -> None:
    """Run a command's `main`. A UserError ends it with status 2 and its message alone; an interrupt with 130."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
