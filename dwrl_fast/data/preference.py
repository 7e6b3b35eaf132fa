"""What one row of preference data is, whatever file it came from, and what became of a file's rows."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TypedDict

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
    aspect: str | None = None  # None: the dialog's own
    source: str = ""  # "file:line"


@dataclass
class Dataset:
    """The rows of one file: each that was read is in `rows`, or its line is in `dropped_lines` under the reason."""

    path: str
    rows: list[Preference] = field(default_factory=list)
    dropped_lines: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dropped(self) -> Counter[str]:
        """How many rows were dropped for each reason."""
        return Counter({reason: len(lines) for reason, lines in self.dropped_lines.items()})

    @property
    def summary(self) -> str:
        """Accounts for every row read, with the first lines of each reason."""
        used, dropped = len(self.rows), self.dropped
        parts = [f"{self.path}: {used + dropped.total()} rows read, {used} used, {dropped.total()} dropped"]
        for reason, count in dropped.most_common():
            lines = ", ".join(map(str, self.dropped_lines[reason][:SHOWN_LINES]))
            parts.append(f"{count} x {reason} (line {lines}{', ...' if count > SHOWN_LINES else ''})")
        return "; ".join(parts)
