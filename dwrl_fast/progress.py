"""Progress of a command: on a terminal bars with the remaining time, otherwise a line every few seconds."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

LINE_EVERY = 10.0  # seconds between the lines of a stage without a terminal


class Stage:
    """One bar. `advance` moves it. total, done: in units of work, `done` at its start. most: the seconds after which
    the work ends, complete or not. quiet: print no lines.
    """

    def __init__(self, display: "Display", name: str, total: int, done: int, most: float, quiet: bool):
        self.display, self.name, self.total, self.most, self.quiet = display, name, total, most, quiet
        self.before, self.done, self.info = done, done, ""
        self.started = self.said = time.monotonic()
        self.task = display.bars.add_task(name, total=total, completed=done, info="", most=most)

    def advance(self, by: int = 1, **info: float | str) -> None:
        """Count `by` units of work as done. info: figures to show beside the bar from now on."""
        self.done += by
        if info:
            self.info = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in info.items())
        self.display.bars.update(self.task, advance=by, info=self.info)
        if (
            not self.display.live
            and not self.quiet
            and (self.done >= self.total or time.monotonic() - self.said > LINE_EVERY)
        ):
            self.said = time.monotonic()
            spent = self.said - self.started
            left = spent / max(self.done - self.before, 1) * (self.total - self.done)
            left = max(0.0, min(left, self.most - spent))
            line = f"{self.name:<22} {self.done}/{self.total}  {spent:.0f} s, {left:.0f} s left  {self.info}"
            self.display.console.print(line, highlight=False, soft_wrap=True)


class Left(ProgressColumn):
    """The remaining time: estimated, and at most what the time limit leaves."""

    max_refresh = 0.5  # seconds

    def render(self, task: Task) -> Text:
        """As H:MM:SS."""
        estimate = math.inf if task.time_remaining is None else task.time_remaining
        left = max(0.0, min(estimate, task.fields["most"] - (task.elapsed or 0.0)))
        return Text("-:--:--" if left == math.inf else str(timedelta(seconds=int(left))), style="progress.remaining")


class Display:
    """The bars of one command, as a context manager. Stages can be nested; an inner bar disappears when it is done."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.live = self.console.is_terminal
        self.bars = Progress(
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Left(),
            TextColumn("{task.fields[info]}", markup=False),
            console=self.console,
            disable=not self.live,
            speed_estimate_period=3600,
        )
        self.depth = 0

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0, most: float = math.inf) -> Iterator[Stage]:
        """A context with a bar of `total` units of work. done: the units that a resumed run has already done. most: the
        seconds after which the work ends, complete or not.
        """
        stage = Stage(self, name, total, done, most, quiet=self.depth > 0)
        self.depth += 1
        try:
            yield stage
        finally:
            self.depth -= 1
            if self.depth > 0:
                self.bars.remove_task(stage.task)
