"""Warnings about readable files: columns and fields that are not read, and texts that look like something else."""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dwrl_fast.data.formats import Format
from dwrl_fast.data.preference import Preference
from dwrl_fast.data.table_text import JSON_MESSAGES, is_transcript

_VERDICT = (
    "it usually names the better response; check that chosen and rejected agree with it, or choose a layout that "
    "reads it with --layout (python -m dwrl_fast.data --formats lists them)"
)
_ANSWERS = "answers that need it are judged without it; remove such rows, or write it into the prompt"
_REASONING = "only `content` is judged; write it into the content if it is to be judged too"
# Columns and message fields that usually matter, and what to do if they are not read.
MEANING: Mapping[str, str] = {
    "system": "--layout system reads it as the system turn",
    "input": "it may be what the prompt works on; --layout alpaca puts `instruction` and `input` together",
    "tools": _ANSWERS,
    "images": _ANSWERS,
    "tool_calls": _ANSWERS,
    "label": _VERDICT,
    "winner": _VERDICT,
    "preference": _VERDICT,
    "reasoning_content": _REASONING,
    "thinking": _REASONING,
}
# Notes that are warnings: the note, and what to do.
REPEATED_PROMPT = "rows whose responses begin with their own prompt"
CONTRADICTED = "scores contradict chosen and rejected, and are left out"
JSON_TEXT = "rows with a text that looks like messages written as JSON"
OTHER_ASPECT = "rows read by their overall scores, because they have no ratings of the aspect of judging"
TRANSCRIPT_TEXT = "rows with a text that looks like a transcript"
REMEDIES: Mapping[str, str] = {
    REPEATED_PROMPT: "the model then reads the prompt twice; remove it from the responses",
    JSON_TEXT: "it is read as plain text; parse it so that the column holds a list of messages",
    TRANSCRIPT_TEXT: "it is read as plain text; --layout transcripts makes turns from `Human:` and `Assistant:`",
    OTHER_ASPECT: "the question and the labels then differ; --aspect NAME asks about an aspect and reads its ratings "
    "(UltraFeedback has helpfulness, honesty, instruction_following and truthfulness)",
    CONTRADICTED: "check that chosen and rejected are not swapped",
}
ODD = re.compile(r"\s*(?:[\[{]|Human:|Assistant:)")  # beginnings of suspicious texts
EMPTY: tuple[Any, ...] = (None, "", [])  # values that are not missed if nothing reads them
LEAST = 10  # minimum characters of a prompt for the check that a response begins with it


@dataclass
class Unread:
    """Counts of rows with a column, and of messages with a field, that has a value but is not read."""

    columns: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.columns or self.fields)

    def add(self, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
        """Add columns of one row."""
        for name in names:
            if values[name] not in EMPTY:
                self.columns[name] += 1

    def update(self, other: "Unread") -> None:
        """Add the counts of other rows."""
        self.columns.update(other.columns)
        self.fields.update(other.fields)

    @property
    def summary(self) -> str:
        """All counts in one line; empty if there are none."""
        parts = ((self.columns, "columns"), (self.fields, "fields of messages"))
        return "; ".join(f"{what} not read: {_named(names)}" for names, what in parts if names)

    def warnings(self, notes: Mapping[str, int]) -> Iterator[str]:
        """Warnings before the rows are used, one line each: important columns and fields that are not read, and the
        `notes` that are warnings.
        """
        for names, what, where in ((self.columns, "column", "rows"), (self.fields, "field", "messages")):
            for name in sorted(names.keys() & MEANING.keys()):
                yield f"the {what} '{name}' is not read, in {names[name]:,} {where}: {MEANING[name]}"
        yield from (f"{count:,} x {note}: {REMEDIES[note]}" for note, count in notes.items() if note in REMEDIES)

    def to_dict(self) -> dict[str, dict[str, int]]:
        """The counts as JSON."""
        return {"columns": dict(self.columns.most_common()), "fields": dict(self.fields.most_common())}


@functools.lru_cache(maxsize=256)
def unread_columns(keys: tuple[str, ...], form: Format, mapping: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The columns of `keys` that are not read from rows of this format."""
    renamed = dict(mapping)
    read = {renamed.get(name, name) for name in form.columns}
    return tuple(name for name in keys if name not in read)


def noted(group: Preference) -> list[str]:
    """Notes about the texts of a group."""
    asked = group.prompt[-1]["content"]
    notes: list[str] = []
    if group.responses[0].startswith(asked) and len(asked) >= LEAST:
        notes += [REPEATED_PROMPT] if all(text.startswith(asked) for text in group.responses) else []
    if odd := [text for text in (asked, *group.responses) if ODD.match(text)]:
        notes += [JSON_TEXT] if any(map(JSON_MESSAGES.match, odd)) else []
        notes += [TRANSCRIPT_TEXT] if any(map(is_transcript, odd)) else []
    return notes


def _named(names: Counter[str]) -> str:
    shown = [repr(name[:40]) for name, _ in names.most_common(12)]
    return ", ".join(shown) + (", ..." if len(names) > 12 else "")
