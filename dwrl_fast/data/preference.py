"""What one group of preference data is, whatever file it came from, and what became of a file's rows."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypedDict

Ties = Literal["drop", "keep"]  # pairs of equally good responses
Rankings = Literal["pairs", "plackett_luce"]  # what a ranking of more than two becomes
Cluster = Literal["row", "prompt"]  # what is drawn for an interval

SHOWN_LINES = 3
# "file:line", "file:line:i-j" (two responses of a row) or "file:line-line" (rows that hold one response each)
LINES = re.compile(r":(\d+)(?:-(\d+)|:\d+-\d+)?$")


def first_lines(lines: Sequence[int], most: int = SHOWN_LINES, count: int | None = None) -> str:
    """For a message: the first `most` of `lines`, or of `count` lines of which `lines` are only the first."""
    return ", ".join(map(str, lines[:most])) + (", ..." if (count or len(lines)) > most else "")


class Message(TypedDict):
    """One chat turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Preference:
    """One preference group, never split: a prompt and its K responses, best first (a pair: chosen, rejected).

    margin: by how much the first of a pair is better, in nats of its likelihood; 0 for other groups.
    ranks: [K], ascending from 1, equal where responses tie; empty where none does, so that they are 1 to K.
    source: "file:line"; "file:line:i-j" for responses i and j of a row of several; "file:line-line" for a pair of rows.
    subset, id: the columns of these names, as text; they name the row in reports and mean nothing to training.
    row: "file:line" of the row that became pairs, the same for all of them; of the first one, where the rows of one
    prompt did. Empty where a row is one group.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    margin: float = 0.0
    ranks: tuple[int, ...] = ()
    aspect: str | None = None  # None: the dialog's own
    source: str = ""
    subset: str | None = None
    id: str | None = None
    row: str = ""

    @property
    def content(self) -> list[Any]:
        """All that is trained on, not where it stood; as JSON can hold it."""
        return [self.prompt, self.responses, self.margin, self.ranks, self.aspect]

    @property
    def lines(self) -> tuple[int, ...]:
        """The rows of the file that it was made of; none where no file was read."""
        found = LINES.search(self.source)
        return () if found is None else tuple(int(line) for line in found.groups() if line)


@dataclass
class Dataset:
    """One file's preferences: each row that was read is used in one or more of `rows`, or is in `dropped`,
    the lines of each reason.

    format: what the rows were recognised as. notes: what else became of rows that are used, such as tied pairs left
    out, each with its count.
    """

    path: str
    rows: list[Preference] = field(default_factory=list)
    dropped: defaultdict[str, list[int]] = field(default_factory=partial(defaultdict, list))
    format: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    unread: Any = None  # an Unread, of what nobody read

    @property
    def used(self) -> int:
        """How many of the file's rows the groups are made of."""
        return len({line for row in self.rows for line in row.lines})

    @property
    def summary(self) -> str:
        """Accounts for every row read, with the first lines of each reason."""
        used, dropped = self.used, sum(map(len, self.dropped.values()))
        name = f"{self.path} ({self.format})" if self.format else self.path
        reasons = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        parts = (
            f"{name}: {used + dropped} rows read, {used} used, {dropped} dropped",
            *([f"{len(self.rows)} groups from the {used} used rows"] if len(self.rows) != used else []),
            *(f"{len(lines)} x {reason} (line {first_lines(sorted(lines))})" for reason, lines in reasons),
            *(f"{count} x {note}" for note, count in self.notes.most_common()),
            *([self.unread.summary] if self.unread is not None and self.unread.summary else []),
        )
        return "; ".join(parts)

    @property
    def warnings(self) -> list[str]:
        """What a person should know before the rows are used: a line each."""
        return [] if self.unread is None else list(self.unread.warnings(self.notes))

    def add(
        self, preferences: Sequence[Preference], dropped: Sequence[tuple[str, int]], notes: Mapping[str, int]
    ) -> None:
        """What came of some rows."""
        self.rows += preferences
        for reason, line in dropped:
            self.dropped[reason].append(line)
        self.notes.update(notes)

    def leave_out(self, unused: Sequence[tuple[Preference, str]]) -> None:
        """Take groups out again, each for a reason. A row of which none is left is dropped; of others it is noted."""
        gone = {id(row) for row, _ in unused}
        self.rows = [row for row in self.rows if id(row) not in gone]
        still = {line for row in self.rows for line in row.lines}
        dropped: dict[int, str] = {}  # a row may have lost several groups
        for row, reason in unused:
            lines = [line for line in row.lines if line not in still]
            for line in lines:
                dropped.setdefault(line, reason)
            if not lines:
                self.notes[f"groups left out: {reason}"] += 1
        for line, reason in dropped.items():
            self.dropped[reason].append(line)
