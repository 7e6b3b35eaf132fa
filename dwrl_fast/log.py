"""The package's logger, and messages that are logged once a process."""

import functools
import logging

logger = logging.getLogger("dwrl_fast")


@functools.cache
def info_once(message: str) -> None:
    """Log the message at level INFO, the first time only."""
    logger.info(message)


@functools.cache
def warn_once(message: str) -> None:
    """Log the message at level WARNING, the first time only."""
    logger.warning(message)
