"""Measures the time of a run by stage."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """seconds: of each stage over the whole run, without the time of nested stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # seconds of nested stages in each open stage, from the outermost
        self.restart()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """A context that adds its duration, without nested stages, to `stage`."""
        started = time.monotonic()
        self.inner.append(0.0)
        try:
            yield
        finally:
            within = self.inner.pop()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        self.inner[-1] += seconds
        self.seconds[stage] += seconds - within

    def restart(self) -> None:
        """Start a new period for `shares`."""
        self.since, self.before = time.monotonic(), dict(self.seconds)

    def shares(self) -> dict[str, float]:
        """The share of each stage in the time since the last call, without stages that took no time."""
        since, before = self.since, self.before
        self.restart()
        passed = {stage: seconds - before.get(stage, 0.0) for stage, seconds in self.seconds.items()}
        return {stage: seconds / (self.since - since) for stage, seconds in passed.items() if seconds > 0}
