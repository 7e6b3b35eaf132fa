"""One group of preference data from any source, and the account of a file's rows."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypedDict

Ties = Literal["drop", "keep"]  # pairs of equally good responses
Rankings = Literal["pairs", "plackett_luce"]  # how a ranking of more than two responses is used
Cluster = Literal["row", "prompt"]  # the unit of the bootstrap

SHOWN_LINES = 3
# "file:line", "file:line:i-j" (two responses of a row) or "file:line-line" (rows that hold one response each)
LINES = re.compile(r":(\d+)(?:-(\d+)|:\d+-\d+)?$")


def first_lines(lines: Sequence[int], most: int = SHOWN_LINES, count: int | None = None) -> str:
    """Text for a message: the first `most` of `lines`. count: the total number, if `lines` holds only the first
    ones.
    """
    return ", ".join(map(str, lines[:most])) + (", ..." if (count or len(lines)) > most else "")


class Message(TypedDict):
    """One chat turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Preference:
    """One preference group, never split: a prompt and its K responses, best first (a pair: chosen, rejected).

    margin: how much better the first response of a pair is, in nats of its likelihood; 0 for other groups.
    ranks: [K], ascending from 1, equal if responses tie; empty if none tie (the ranks are then 1 to K).
    source: "file:line"; "file:line:i-j" for responses i and j of a row of several; "file:line-line" for a pair of rows.
    subset, id: the columns of these names, as text; reports use them, training does not.
    row: "file:line" of the row that several groups come from, or of the first row if the groups come from several rows
    of one prompt. Empty if a row is one group.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    margin: float = 0.0
    ranks: tuple[int, ...] = ()
    aspect: str | None = None  # None: the aspect of the dialog
    source: str = ""
    subset: str | None = None
    id: str | None = None
    row: str = ""

    @property
    def content(self) -> list[Any]:
        """Everything that training uses, without the source; as JSON."""
        return [self.prompt, self.responses, self.margin, self.ranks, self.aspect]

    @property
    def lines(self) -> tuple[int, ...]:
        """The line numbers of the rows that it was made from; empty without a file."""
        found = LINES.search(self.source)
        return () if found is None else tuple(int(line) for line in found.groups() if line)


@dataclass
class Dataset:
    """The preferences of one file. Each row that was read is used in one or more of `rows`, or listed in `dropped`
    (reason -> lines).

    format: the recognised format of the rows. notes: counts of other events in used rows, such as tied pairs left out.
    """

    path: str
    rows: list[Preference] = field(default_factory=list)
    dropped: defaultdict[str, list[int]] = field(default_factory=partial(defaultdict, list))
    format: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    unread: Any = None  # an Unread: columns and fields that were not read

    @property
    def used(self) -> int:
        """The number of rows of the file that the groups come from."""
        return len({line for row in self.rows for line in row.lines})

    @property
    def summary(self) -> str:
        """A text that accounts for every row read, with the first lines for each reason."""
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
        """Warnings before the rows are used, one line each."""
        return [] if self.unread is None else list(self.unread.warnings(self.notes))

    def add(
        self, preferences: Sequence[Preference], dropped: Sequence[tuple[str, int]], notes: Mapping[str, int]
    ) -> None:
        """Add the outcome of some rows."""
        self.rows += preferences
        for reason, line in dropped:
            self.dropped[reason].append(line)
        self.notes.update(notes)

    def leave_out(self, unused: Sequence[tuple[Preference, str]]) -> None:
        """Remove groups, each with a reason. A row without any remaining group is dropped; for other rows the removal
        is noted.
        """
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
