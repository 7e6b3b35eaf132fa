"""The package's logger, and messages that are logged once per process."""

import functools
import logging
import re

logger = logging.getLogger("dwrl_fast")

# Characters that move the cursor, control the terminal, or change the direction of text. Tabs and line ends are
# harmless.
CONTROLS = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def escaped(text: str) -> str:
    """`text` with its control characters escaped, so that text from a file cannot control the terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


@functools.cache
def info_once(message: str) -> None:
    """Log the message at level INFO, the first time only."""
    logger.info(message)


@functools.cache
def warn_once(message: str) -> None:
    """Log the message at level WARNING, the first time only."""
    logger.warning(message)
