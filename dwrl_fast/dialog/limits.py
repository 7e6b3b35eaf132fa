"""Limits of time and memory for chat templates, which are code from other people.

When a template renders a sequence of roles for the first time, its steps are counted and memory is limited:
`within_bounds`. That would double the time of every further row, so a thread checks those instead, 20 times a second:
`Watched`.
"""

import ctypes
import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

TEMPLATE = "<template>"  # the file of what jinja compiles
STEPS = 1_000_000  # lines of a template, and calls, of one rendering: a long conversation takes some thousand
SECONDS = 5.0  # processor time of one rendering; a long conversation takes a thousandth
MEMORY = 256 << 20  # additional bytes of memory
TEXT = 1 << 20  # characters that a template may add to the contents
TIMES = 16  # output characters, and bytes of memory, per character of the contents
TICK = 0.05  # seconds between two checks
TRIES = 3  # of a rendering that takes too much memory


class LimitError(Exception):
    """The code took too long, too much memory, or wrote too much."""


class SlowError(LimitError):
    """Too much processor time, found by `Watched`."""

    def __str__(self) -> str:
        return f"it takes more than {SECONDS:g} s"


class LargeError(LimitError):
    """Too much memory, found by `Watched`."""

    def __str__(self) -> str:
        return f"it takes more than {MEMORY >> 20} MiB"


@contextmanager
def within_bounds() -> Iterator[None]:
    """A context for rendering templates, in one thread at a time. Raises LimitError after STEPS lines and calls. On
    Linux, allocations of more than MEMORY bytes raise MemoryError, also in other threads.
    """
    left = STEPS

    def traced(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise LimitError(f"it took more than {STEPS:,} steps")
        return traced if frame.f_code.co_filename == TEMPLATE else None

    with _bounded:  # otherwise one thread would take the limit of another for the one to restore
        before, limits = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
        if held := _held(0):
            most = held + MEMORY if limits[1] == resource.RLIM_INFINITY else min(held + MEMORY, limits[1])
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        sys.settrace(traced)
        try:
            yield
        finally:
            sys.settrace(before)
            resource.setrlimit(resource.RLIMIT_AS, limits)


def check_size(rendered: Any, size: int) -> None:
    """Raise LimitError if the rendered text, or its ids, is too long for contents of `size` characters."""
    if len(rendered) > TEXT + TIMES * size:
        raise LimitError(f"it turns {size:,} characters into {len(rendered):,}")


def watched(render: Callable[[], Any], size: int) -> Any:
    """The result of `render` on contents of `size` characters. Raises LimitError like `Watched`. The growth of the
    process may be the work of another thread, so a rendering that takes too much memory is tried again.
    """
    for _ in range(TRIES - 1):
        with suppress(LargeError), Watched(size):
            return render()
        gc.collect()  # jinja rewrites tracebacks, and cycles among them hold what the rendering made
        _watch.held = _held(1)
    with Watched(size):
        return render()


class Watched:
    """A context in which this thread may use SECONDS of processor time, and the process may grow by MEMORY plus TIMES
    `size` bytes; beyond that it raises LimitError. A single operation of Python is not interrupted: it ends first.
    """

    __slots__ = ("began", "held", "size", "stopped", "thread")

    def __init__(self, size: int):
        self.size, self.thread = size, threading.get_ident()
        self.stopped: type[LimitError] | None = None

    def __enter__(self) -> Self:
        if _watch.thread is None:
            _watch.start()
        self.began, self.held = _used(self.thread), _watch.held  # processor seconds; bytes at the last check
        _watch.calls[self.thread] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with _watch.lock:
            _watch.calls.pop(self.thread, None)
        if self.stopped is not None and kind is not self.stopped:
            with suppress(LimitError):  # the exception was sent to this thread: wait for it here
                for _ in range(10_000):
                    time.sleep(0.0001)
            raise self.stopped


class _Watch:
    """The thread that checks, and the running calls by their threads."""

    def __init__(self) -> None:
        self.calls: dict[int, Watched] = {}
        self.lock = threading.Lock()
        self.held = 0  # bytes at the last check
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        self.held = _held(1)
        self.thread = threading.Thread(target=self.look_on, name="templates", daemon=True)
        self.thread.start()

    def forget(self) -> None:
        """Reset in a forked process, which has no other threads."""
        self.calls, self.lock, self.thread = {}, threading.Lock(), None

    def look_on(self) -> None:
        while True:
            time.sleep(TICK)
            self.held = _held(1) or self.held
            with self.lock:
                for call in list(self.calls.values()):
                    self.look(call)

    def look(self, call: Watched) -> None:
        used = _used(call.thread) - call.began
        if used > SECONDS:
            self.stop(call, SlowError)
        elif used > TICK / 10 and self.held - call.held > MEMORY + TIMES * call.size:
            self.stop(call, LargeError)

    def stop(self, call: Watched, error: type[LimitError]) -> None:
        """Raise `error` in the thread of `call`, once."""
        call.stopped = error
        del self.calls[call.thread]
        raise_in(call.thread, error)


_C = ctypes.PyDLL(None)  # the functions of the process, called without releasing the interpreter's lock
_watch = _Watch()
_bounded = threading.Lock()
os.register_at_fork(  # no process is forked while the limit of memory holds: its child would keep it
    before=_bounded.acquire, after_in_parent=_bounded.release, after_in_child=_bounded.release
)
os.register_at_fork(after_in_child=_watch.forget)


def raise_in(thread: int, error: type[LimitError]) -> None:
    """Raise `error` in another thread, when it runs the next Python instruction."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def _used(thread: int) -> float:
    """The processor seconds of a thread; wall time if the system does not report them."""
    clock = getattr(time, "pthread_getcpuclockid", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock(thread))


def _held(column: int) -> int:
    """Bytes of this process: address space (column 0) or resident memory (1); 0 if the system does not report them.

    A file object would release the interpreter's lock at each step, and a template that doubles a text could do so once
    more in each. So these calls hold it.
    """
    text, file = ctypes.create_string_buffer(256), _C.open(b"/proc/self/statm", os.O_RDONLY)
    length = _C.read(file, text, len(text))
    _C.close(file)
    return int(text.value.split()[column]) * resource.getpagesize() if length > 0 else 0
