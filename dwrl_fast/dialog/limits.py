"""Code of others, chat templates, run within bounds of time and memory."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

TEMPLATE = "<template>"  # the file of what jinja compiles
STEPS = 1_000_000  # lines of a template, and calls, of one rendering: a long conversation takes some thousand
MEMORY = 256 << 20  # bytes that it may take more than there are


class LimitError(Exception):
    """The code took too long."""


@contextmanager
def within_bounds() -> Iterator[None]:
    """A context in which templates may be rendered for STEPS lines and calls, LimitError past them; and, on Linux, take
    MEMORY of memory, MemoryError past it, in other threads too.
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
    """Bytes of address space that this process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
