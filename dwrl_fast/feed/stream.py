"""A source that is read on demand. Only a shuffle buffer of rows is in memory; the next row is drawn from it.

A checkpoint stores the positions of the buffer's rows in the file, not the rows. They are read again on resume.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

from dwrl_fast.compute import step_seed
from dwrl_fast.data import START, Outcome, Position, Preference, Reader
from dwrl_fast.data.formats import SINGLE
from dwrl_fast.data.preference import SHOWN_LINES, first_lines
from dwrl_fast.errors import CheckpointError, DataError
from dwrl_fast.feed.files import StreamedFiles
from dwrl_fast.feed.source import content_hash, with_aspect
from dwrl_fast.log import logger

MALFORMED = "not in the expected form"

Check = Callable[[Preference], tuple[str, Counter[str]]]  # the reason to drop a row, or ""; and notes about it


class Segment(NamedTuple):
    """A piece of a source where reading can start: the outcome of its rows from `start` to `outcome.after`."""

    start: Position
    outcome: Outcome
    errors: list[tuple[int, DataError]]  # (line, error)


class Held(NamedTuple):
    """A row in the buffer: row `place` of the segment that begins at `start`."""

    start: Position
    place: int
    row: Preference


@dataclass
class Account:
    """The account of the rows of the first pass, in constant memory: the count of each reason, and its first lines."""

    used: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, line: int | None = None, count: int = 1) -> None:
        """Count rows with this outcome. line: one of them."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        lines = self.lines.setdefault(reason, [])
        if line is not None and len(lines) < SHOWN_LINES:
            lines.append(line)

    def __str__(self) -> str:
        parts = [f"{self.used} groups used"]
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            shown = f" (line {first_lines(self.lines[reason], count=count)})" if self.lines[reason] else ""
            parts.append(f"{count} x {reason}{shown}")
        return "; ".join(parts)


class Streamed:
    """A Source in constant memory. Each row is given once per epoch. An epoch begins when the previous one is used up.

    The file must not change. This is verified at the start and end of a pass, if reading fails, and at each `state`.

    check: tests whether a row can be used, when it is drawn. aspect: the aspect of rows without one. salt: further
    settings that the use of a row depends on, for the identity.
    """

    streamed: ClassVar[bool] = True

    def __init__(
        self,
        reader: Reader,
        check: Check,
        *,
        buffer_size: int,
        seed: int,
        stream: str = "order",
        aspect: str | None = None,
        salt: Any = None,
    ):
        self.reader, self.check, self.aspect, self.salt = reader, check, aspect, salt
        self.name, self.buffer_size, self.seed, self.stream = reader.source.name, buffer_size, seed, stream
        self.files = StreamedFiles(self.name)
        self.drawn = self.epoch = 0
        self.turns = self.used = 0  # in this epoch: rows taken out of the buffer, and rows given
        self.account = Account()
        self.buffer: list[Held] = []
        self.read_to, self.taken = START, 0  # the current segment of reading, and the number of its rows taken
        self.reading = self._read()

    @property
    def rows(self) -> int | None:
        """The number of groups in an epoch, known after the first one."""
        return self.account.used if self.epoch else None

    @property
    def summary(self) -> str:
        """Its progress and the account of the rows, in words."""
        where = (
            "read to the end"
            if self.epoch
            else f"read to line {self.read_to.line}, {len(self.buffer)} waiting in the buffer"
        )
        return f"{self.name}: {self.drawn:,} rows drawn, {where}; {self.account}"

    def draw(self) -> Preference:
        """The next usable row. Raises DataError if a pass gives none, or if the file cannot be read further or was
        changed.
        """
        while True:
            if not self.buffer:
                self._begin()
            place = step_seed(self.seed, f"{self.stream}/{self.epoch}", self.turns) % len(self.buffer)
            self.turns += 1
            row = self.buffer[place].row
            following = next(self.reading, None)
            if following is None:
                following = self.buffer[-1]
                self.buffer.pop()
            if place < len(self.buffer):
                self.buffer[place] = following
            reason, notes = self.check(row)
            for note, count in notes.items():
                self._count(note, count=count)
            if reason:
                self._count(reason, row.lines[0] if row.lines else None)
                continue
            self.used += 1
            self.drawn += 1
            self.account.used += not self.epoch
            return row

    def identity(self) -> dict[str, Any]:
        """The identity of the file when the stream was opened, and how it is read."""
        reader = self.reader
        read = {"layout": reader.layout and reader.layout.names, "labels": reader.aspect}
        read |= {"ties": reader.ties, "rankings": reader.rankings}
        # Checkpoints of an older version lack all of these but the layout; they belong to runs with the defaults.
        changed = {name: value for name, value in read.items() if value not in (None, "drop", "pairs")}
        return self.files.identity | {"columns": reader.columns, "aspect": self.aspect, "salt": self.salt} | changed

    def state(self) -> dict[str, Any]:
        """The position, as JSON. Raises DataError if the file was changed."""
        self.files.verify()
        first = min((held.start for held in self.buffer), default=self.read_to)
        return {
            "drawn": self.drawn,
            "epoch": self.epoch,
            "turns": self.turns,
            "used": self.used,
            "account": asdict(self.account),
            "read_to": list(self.read_to),
            "taken": self.taken,
            "buffer_from": list(first),
            "buffer_lines": [held.start.line for held in self.buffer],
            "buffer_places": [held.place for held in self.buffer],
            "buffer_content": content_hash(held.row for held in self.buffer),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises CheckpointError if the rows of the buffer have changed."""
        self.drawn, self.epoch, self.turns, self.used = (state[k] for k in ("drawn", "epoch", "turns", "used"))
        self.account = Account(**state["account"])
        self.read_to, self.taken = Position(*state["read_to"]), state["taken"]
        keys = list(zip(state["buffer_lines"], state["buffer_places"], strict=True))
        self.buffer = self._read_again(Position(*state["buffer_from"]), keys)
        if content_hash(held.row for held in self.buffer) != state["buffer_content"]:
            raise CheckpointError(
                f"{self.name} has changed since the checkpoint was written: the rows of the shuffle buffer are "
                "different now. Resume with the original file, or start a new run in another --output_dir."
            )
        self.reading = self._read()

    def _begin(self) -> None:
        """Begin a pass. Raises DataError if there is nothing to read, or if the last pass gave no row."""
        self.files.verify()
        if self.turns:
            self._check_used()
            if not self.epoch:
                logger.info("%s: read to the end; %s", self.name, self.account)
                for line in self.reader.unread.warnings(self.account.counts):
                    logger.warning("%s: %s", self.name, line)
            self.epoch += 1
            self.turns = self.used = 0
            self.read_to, self.taken = START, 0
            self.reading = self._read()
        self.buffer = list(itertools.islice(self.reading, self.buffer_size))
        if not self.buffer:
            self._check_used()

    def _check_used(self) -> None:
        if not self.used:
            raise DataError(f"no usable row in the whole of {self.name}: {self.account}")

    def _read(self) -> Iterator[Held]:
        """Rows from the current position on. Updates the position and counts the outcomes."""
        try:
            for segment in self._segments(self.read_to):
                if not self.taken:  # otherwise the segment was counted before the checkpoint
                    self._account(segment)
                for index, row in enumerate(segment.outcome.preferences[self.taken :], start=self.taken):
                    self.read_to, self.taken = segment.start, index + 1
                    yield Held(segment.start, index, with_aspect(row, self.aspect))
                self.read_to, self.taken = segment.outcome.after, 0
        except DataError:
            self.files.verify()  # an unreadable row may be the result of a change
            raise
        self.files.verify()  # the file may have been truncated

    def _read_again(self, start: Position, keys: list[tuple[int, int]]) -> list[Held]:
        """Read the rows of a buffer again, from `start` on."""
        wanted, found = set(keys), {}
        if wanted:
            logger.info(
                "%s: reading lines %d to %d again, for the %d rows that wait in the shuffle buffer",
                *(self.name, start.line + 1, max(wanted)[0] + 1, len(wanted)),
            )
            for segment in self._segments(start):
                for index, row in enumerate(segment.outcome.preferences):
                    if (segment.start.line, index) in wanted:
                        found[segment.start.line, index] = Held(segment.start, index, with_aspect(row, self.aspect))
                if len(found) == len(wanted):
                    break
        return [found[key] for key in keys if key in found]

    def _segments(self, start: Position) -> Iterator[Segment]:
        errors: list[tuple[int, DataError]] = []
        after = start
        for outcome in self.reader.read(start):
            if outcome.error is not None:
                errors.append((outcome.after.line, outcome.error))
                after = outcome.after
                if self.reader.format is SINGLE:  # the rows of a prompt may be on both sides of it
                    continue
                outcome = Outcome(after)
            yield Segment(start, outcome, errors)
            start, errors = outcome.after, []
        if errors:
            yield Segment(start, Outcome(after), errors)

    def _account(self, segment: Segment) -> None:
        """Count dropped rows and errors. A malformed row ends the run if nothing has been drawn yet; later it is only
        counted.
        """
        if segment.errors:
            self.files.verify()
        for line, error in segment.errors:
            if not self.drawn:
                raise error
            if not self.epoch and MALFORMED not in self.account.counts:
                logger.warning("A malformed row is left out, and so is every other malformed row: %s", error)
            self._count(MALFORMED, line)
        for reason, line in segment.outcome.dropped:
            self._count(reason, line)
        for note, count in segment.outcome.notes.items():
            self._count(note, count=count)

    def _count(self, reason: str, line: int | None = None, count: int = 1) -> None:
        if not self.epoch:
            self.account.add(reason, line, count)
