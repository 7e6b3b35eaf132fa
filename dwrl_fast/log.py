"""The package's logger, and messages that are said once a process."""

import functools
import logging

logger = logging.getLogger("dwrl_fast")


@functools.cache
def info_once(message: str) -> None:
    logger.info(message)


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)
