"""What the rows of a stretch of a source hold, in a few numbers each: lengths, and digests in place of texts.

A row of one pair takes about 80 bytes, whatever its length. The counts of the stretches of a file add up to the file's.
"""

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest as digest

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.formats import SINGLE
from dwrl_fast.data.preference import Message, Preference
from dwrl_fast.data.reading import Outcome, Reader
from dwrl_fast.data.row_source import START, Position
from dwrl_fast.errors import DataError

ROLE = {"system": 1, "user": 2, "assistant": 3}
DETAIL = re.compile(r" \(|; |, not the | among '")  # what follows differs from row to row, or says what to do

ROW = np.dtype([("line", "i8"), ("prompt", "u8"), ("length", "i4"), ("longest", "i4")])
RESPONSE = np.dtype("i4")
COMPARISON = np.dtype(
    [
        *(("line", "i8"), ("key", "u8"), ("first", "u8"), ("second", "u8")),
        *(("first_length", "i4"), ("second_length", "i4"), ("strength", "f4")),
    ]
)

Lengths = tuple[int, list[int]]
Measure = Callable[[Sequence[Message], Sequence[str], str | None], Lengths]
"""The lengths of a prompt and of each of its responses, given the aspect. Raises Unusable for what has none."""


def characters(prompt: Sequence[Message], responses: Sequence[str], aspect: str | None) -> Lengths:
    """A Measure."""
    return sum([len(turn["content"]) for turn in prompt]), list(map(len, responses))


def prompt_digest(prompt: Sequence[Message]) -> int:
    """64 bits, the same for equal prompts alone."""
    code = 0
    for turn in prompt:
        code = digest(turn["content"].encode(), code ^ ROLE[turn["role"]])
    return code


class Records:
    """Records of one type, appended as tuples and kept as arrays."""

    def __init__(self, kind: np.dtype) -> None:
        self.kind = kind
        self.parts: list[np.ndarray] = []
        self.new: list[Any] = []

    def pack(self, least: int = 0) -> None:
        """What was appended becomes an array, where that is more than `least` records."""
        if len(self.new) > least:
            self.parts.append(np.array(self.new, self.kind))
            self.new.clear()

    @property
    def all(self) -> np.ndarray:
        self.pack()
        self.parts = [np.concatenate(self.parts)] if self.parts else [np.empty(0, self.kind)]
        return self.parts[0]


@dataclass
class Counts:
    """rows: a record of each row that is used (SINGLE: of each prompt): its first line, the digest and length of its
    prompt, the length of its longest response. responses: the length of each response of a row. comparisons: a record
    of each two of them that are compared: `key` stands for prompt and aspect, `first` (the better, or one of two that
    tie) and `second` for the responses, `strength` for by how much (0: tied).
    """

    lines: int = 0  # that the stretch spans, blank ones too
    used: int = 0
    groups: int = 0
    dropped: dict[str, array] = field(default_factory=dict)  # reason -> lines
    advice: dict[str, str] = field(default_factory=dict)  # reason -> what the reader said in full, the first time
    notes: Counter[str] = field(default_factory=Counter)
    rows: Records = field(default_factory=lambda: Records(ROW))
    responses: Records = field(default_factory=lambda: Records(RESPONSE))
    comparisons: Records = field(default_factory=lambda: Records(COMPARISON))

    @property
    def read(self) -> int:
        return self.used + sum(map(len, self.dropped.values()))

    def count(self, reason: str) -> int:
        """How many rows are dropped for it."""
        return len(self.dropped[reason])

    def extend(self, other: "Counts") -> None:
        """Take over what follows: `other`, whose lines count from 1 again."""
        for reason, lines in other.dropped.items():
            self.dropped.setdefault(reason, array("q")).extend([line + self.lines for line in lines])
            self.advice.setdefault(reason, other.advice[reason])
        for records in (other.rows, other.comparisons):
            records.all["line"] += self.lines
        for mine, new in zip(self._records, other._records, strict=True):
            mine.parts.append(new.all)
        self.lines, self.used, self.groups = (
            self.lines + other.lines,
            self.used + other.used,
            self.groups + other.groups,
        )
        self.notes.update(other.notes)

    def drop(self, reason: str, line: int, advice: str = "") -> None:
        self.dropped.setdefault(reason, array("q")).append(line)
        self.advice.setdefault(reason, advice)

    def pack(self, least: int = 0) -> None:
        for records in self._records:
            records.pack(least)

    @property
    def _records(self) -> tuple[Records, Records, Records]:
        return self.rows, self.responses, self.comparisons


def count_rows(
    reader: Reader,
    start: Position = START,
    end: int | None = None,
    measure: Measure = characters,
    progress: Callable[[Position], None] | None = None,
) -> Counts:
    """Of the rows from `start` up to byte `end`, where a row must begin; lines are counted from `start`.

    `progress` is told now and then how far it is.
    """
    found = Counts()
    for count, outcome in enumerate(reader.read(start)):
        after = outcome.after
        if end is not None and after.offset > end:
            found.lines = after.line - 1
            break
        found.lines = after.line
        if outcome.preferences:
            _use(found, outcome, used_lines(outcome, reader), measure)
        elif outcome.error is not None:
            _drop_malformed(found, outcome.error, reader.source.name, after.line)
        for reason, line in outcome.dropped:
            found.drop(reason, line)
        if count % 4096 == 0:
            found.pack(least=4096)
            if progress is not None:
                progress(after)
    found.pack()
    return found


def _drop_malformed(found: Counts, error: DataError, name: str, line: int) -> None:
    said = str(error).removeprefix(f"{name}:{line}: ")
    found.drop(DETAIL.split(said, maxsplit=1)[0], line, said)


def used_lines(outcome: Outcome, reader: Reader) -> Sequence[int]:
    """The rows that what came of one row, or of the rows of one prompt, is made of."""
    if not outcome.preferences:
        return ()
    if reader.format is not SINGLE:
        return (outcome.after.line,)
    return sorted({line for group in outcome.preferences for line in group.lines})


def _use(found: Counts, outcome: Outcome, lines: Sequence[int], measure: Measure) -> None:
    """What one row gave, or the rows of one prompt."""
    groups = outcome.preferences
    group = groups[0]
    prompt, aspect = group.prompt, group.aspect
    texts: Sequence[str] = group.responses
    if len(groups) > 1:
        texts = list(dict.fromkeys(text for group in groups for text in group.responses))
    try:
        size, sizes = measure(prompt, texts, aspect)
    except Unusable as reason:
        for line in lines:
            found.drop(str(reason), line)
        return
    code = prompt_digest(prompt)
    key = code if aspect is None else digest(aspect.encode(), code)
    found.used += len(lines)
    found.groups += len(groups)
    if outcome.notes:
        found.notes.update(outcome.notes)
    found.rows.new.append((lines[0], code, size, max(sizes)))
    found.responses.new += sizes
    if type(group) is not Preference:  # a demonstration: its responses stand in no order
        return
    codes = [digest(text.encode()) for text in texts]
    if len(groups) == 1 and len(texts) == 2:
        found.comparisons.new.append((lines[0], key, *codes, *sizes, _strength(group)))
    else:
        known = dict(zip(texts, zip(codes, sizes, strict=True), strict=True))
        found.comparisons.new += [(lines[0], key, *two) for two in _comparisons(groups, known)]


def _strength(pair: Preference) -> float:
    return 0.0 if pair.ranks else pair.margin or 1.0


def _comparisons(
    groups: Sequence[Preference], known: dict[str, tuple[int, int]]
) -> Iterator[tuple[int, int, int, int, float]]:
    """Each two responses that are compared, the better first: their digests, their lengths, by how much."""
    for group in groups:
        pair = len(group.responses) == 2
        ranks = group.ranks or range(len(group.responses))
        for (better, rank), (worse, other) in itertools.combinations(zip(group.responses, ranks, strict=True), 2):
            (first, size), (second, size_of_second) = known[better], known[worse]
            yield first, second, size, size_of_second, _strength(group) if pair else float(other - rank)
