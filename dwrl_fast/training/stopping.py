"""SIGTERM and SIGINT during training: the first one is noted, so that the run can save and stop; the second one ends
the run.
"""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from dwrl_fast.errors import Stopped
from dwrl_fast.log import logger
from dwrl_fast.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TOGETHER = 2.0  # seconds in which processes can get the same signal twice, from the terminal and from torchrun


class Stopping:
    """A context in which the first signal is only noted. A second one raises `Stopped` at once.

    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.signal, self.since = 0, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and kind is None:  # it came after the last save, which is complete
            raise Stopped(self.signal, saved=True)

    def asked(self) -> int:
        """The signal that any rank has received; 0 if none. All ranks call this together."""
        return self.ranks.largest(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if self.ranks.mesh is not None and time.monotonic() - self.since < TOGETHER:
                return
            raise Stopped(number)
        self.signal, self.since = number, time.monotonic()
        logger.warning(
            "%s: the run saves a checkpoint after the current update, then stops. A second signal stops it at once, "
            "without a checkpoint.",
            signal.Signals(number).name,
        )
