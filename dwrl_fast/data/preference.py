"""What one row of preference data is, whatever file it came from."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypedDict

ROLES = ("system", "user", "assistant")
SHOWN_LINES = 3


class Message(TypedDict):
    """One chat turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Preference:
    """One preference group, never split: a prompt and its K responses, best first (a pair: chosen, rejected)."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    margin: float = 0.0
    aspect: str | None = None
    source: str = ""  # "file:line"


@dataclass
class Dropped:
    """Rows that were read and not used: how many for each reason, and the lines they stand in."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        self.counts[reason] += 1
        self.lines.setdefault(reason, []).append(line)

    def __len__(self) -> int:
        return self.counts.total()

    def __iter__(self) -> Iterator[str]:
        """One sentence a reason, the most frequent first, with the first few line numbers."""
        for reason, count in self.counts.most_common():
            shown = ", ".join(map(str, self.lines[reason][:SHOWN_LINES]))
            yield f"{count} x {reason} (line {shown}{', ...' if count > SHOWN_LINES else ''})"


@dataclass
class Dataset:
    """The rows of one file. Every row that was read is either in `rows` or counted in `dropped`."""

    path: str
    rows: list[Preference] = field(default_factory=list)
    dropped: Dropped = field(default_factory=Dropped)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def summary(self) -> str:
        """One line that accounts for every row read."""
        read = len(self.rows) + len(self.dropped)
        return "; ".join(
            [f"{self.path}: {read} rows read, {len(self.rows)} used, {len(self.dropped)} dropped", *self.dropped]
        )
