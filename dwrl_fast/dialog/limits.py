"""Runs chat templates, which are third-party code, with limits on time and memory."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

TEMPLATE = "<template>"  # the file name of code compiled by jinja
STEPS = 1_000_000  # template lines and calls of one rendering; a long conversation takes some thousand
MEMORY = 256 << 20  # bytes that it may allocate


class LimitError(Exception):
    """The code took too long."""


@contextmanager
def within_bounds() -> Iterator[None]:
    """A context for rendering templates. Raises LimitError after STEPS lines and calls. On Linux, allocations of more
    than MEMORY bytes raise MemoryError, also in other threads.
    """
    left = STEPS

    def traced(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise LimitError(f"it took more than {STEPS:,} steps")
        return traced if frame.f_code.co_filename == TEMPLATE else None

    before, limits = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    if held := _held():
        most = held + MEMORY if limits[1] == resource.RLIM_INFINITY else min(held + MEMORY, limits[1])
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    sys.settrace(traced)
    try:
        yield
    finally:
        sys.settrace(before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _held() -> int:
    """Bytes of address space of this process; 0 if unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
