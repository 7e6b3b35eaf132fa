"""Summarises the rows of a part of a source by a few numbers each: lengths, and digests instead of texts.

A row with one pair takes about 80 bytes, whatever its length. The counts of all parts of a file add up to those of the
file.
"""

import itertools
import re
import struct
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from xxhash import xxh3_64_intdigest as digest

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.preference import Message, Preference
from dwrl_fast.data.reading import Outcome, Reader
from dwrl_fast.data.remarks import Unread
from dwrl_fast.data.row_source import START, Position

ROLE = {"system": 1, "user": 2, "assistant": 3}
DETAIL = re.compile(r" \(|; |, not the | among '")  # what follows differs between rows, or is advice

# The type codes have the same meaning in `struct` and in NumPy.
ROW = np.dtype([("line", "q"), ("prompt", "Q"), ("length", "i"), ("longest", "i")])
COMPARISON = np.dtype(
    [
        *(("line", "q"), ("key", "Q"), ("first", "Q"), ("second", "Q")),
        *(("first_length", "i"), ("second_length", "i"), ("strength", "d")),
    ]
)

Lengths = tuple[int, list[int]]
Measure = Callable[[Sequence[Message], Sequence[str], str | None], Lengths]
"""The lengths of a prompt and of each of its responses, given the aspect. Raises Unusable if a length cannot be
measured.
"""


def characters(prompt: Sequence[Message], responses: Sequence[str], aspect: str | None) -> Lengths:
    """Lengths in characters: a Measure."""
    return sum([len(turn["content"]) for turn in prompt]), list(map(len, responses))


def prompt_digest(prompt: Sequence[Message]) -> int:
    """A digest of 64 bits, equal only for equal prompts."""
    code = 0
    for turn in prompt:
        code = digest(turn["content"].encode(), code ^ ROLE[turn["role"]])
    return code


class Records:
    """Records of one structured dtype, appended one by one and kept as bytes."""

    def __init__(self, kind: np.dtype) -> None:
        self.kind, self.bytes = kind, bytearray()
        self.form = "=" + "".join(kind[name].char for name in kind.names or ())

    def add(self, *values: float) -> None:
        """Append one record."""
        self.bytes += struct.pack(self.form, *values)

    @property
    def all(self) -> np.ndarray:
        """The records as an array over their bytes. While it is held, nothing can be appended."""
        return np.frombuffer(self.bytes, self.kind)


@dataclass
class Counts:
    """rows: a record for each used row (SINGLE: for each prompt): first line, digest and length of the prompt, length
    of the longest response. responses: the length of each response. comparisons: a record for each compared pair of
    responses: digests `key` of prompt and aspect, `first` (the better response, or one of two that tie) and `second`,
    and `strength`, by how much the first is better (0: tied).
    """

    lines: int = 0  # lines of this part, including blank ones
    used: int = 0
    groups: int = 0
    dropped: defaultdict[str, array] = field(default_factory=partial(defaultdict, partial(array, "q")))  # their lines
    advice: dict[str, str] = field(default_factory=dict)  # reason -> the reader's first full message
    notes: Counter[str] = field(default_factory=Counter)
    unread: Unread = field(default_factory=Unread)
    rows: Records = field(default_factory=partial(Records, ROW))
    responses: array = field(default_factory=partial(array, "i"))
    comparisons: Records = field(default_factory=partial(Records, COMPARISON))

    @property
    def read(self) -> int:
        """The number of rows read: used + dropped."""
        return self.used + sum(map(len, self.dropped.values()))

    def extend(self, other: "Counts") -> None:
        """Add the counts of the next part, whose lines are numbered from 1 again."""
        for reason, lines in other.dropped.items():
            self.dropped[reason].extend(line + self.lines for line in lines)
            self.advice.setdefault(reason, other.advice[reason])
        for records, more in ((self.rows, other.rows), (self.comparisons, other.comparisons)):
            more.all["line"] += self.lines
            records.bytes += more.bytes
        self.responses += other.responses
        self.lines += other.lines
        self.used += other.used
        self.groups += other.groups
        self.notes.update(other.notes)
        self.unread.update(other.unread)

    def drop(self, reason: str, line: int, advice: str = "") -> None:
        """Count a row as dropped."""
        self.dropped[reason].append(line)
        self.advice.setdefault(reason, advice)


def count_rows(
    reader: Reader,
    start: Position = START,
    end: int | None = None,
    measure: Measure = characters,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """The counts of the rows from `start` up to byte `end`, where a row must begin. Lines are counted from `start`.

    `progress` is called now and then with the bytes read (JSONL) or the rows read.
    """
    found = Counts()
    for count, outcome in enumerate(reader.read(start)):
        after = outcome.after
        if end is not None and after.offset > end:
            found.lines = after.line - 1
            reader.last = Unread()  # that row does not belong to this part
            break
        found.lines = after.line
        if outcome.preferences:
            _use(found, outcome, measure)
        elif outcome.error is not None:
            said = str(outcome.error).removeprefix(f"{reader.source.name}:{after.line}: ")
            found.drop(DETAIL.split(said, maxsplit=1)[0], after.line, said)
        for reason, line in outcome.dropped:
            found.drop(reason, line)
        if progress is not None and count % 4096 == 0:
            progress(after.offset or after.line)
    found.unread = reader.unread
    return found


def _use(found: Counts, outcome: Outcome, measure: Measure) -> None:
    """Add the outcome of one row, or of the rows of one prompt."""
    groups, lines = outcome.preferences, outcome.lines
    group = groups[0]
    texts: Sequence[str] = group.responses
    if len(groups) > 1:
        texts = list(dict.fromkeys(text for each in groups for text in each.responses))
    try:
        size, sizes = measure(group.prompt, texts, group.aspect)
    except Unusable as reason:
        for line in lines:
            found.drop(str(reason), line)
        return
    code = prompt_digest(group.prompt)
    key = code if group.aspect is None else digest(group.aspect.encode(), code)
    found.used += len(lines)
    found.groups += len(groups)
    if outcome.notes:
        found.notes.update(outcome.notes)
    found.rows.add(lines[0], code, size, max(sizes))
    found.responses.extend(sizes)
    if type(group) is not Preference:  # a demonstration: its responses are not ranked
        return
    codes = [digest(text.encode()) for text in texts]
    if len(groups) == 1 and len(texts) == 2:  # the case of most files
        found.comparisons.add(lines[0], key, *codes, *sizes, _strength(group))
        return
    known = dict(zip(texts, zip(codes, sizes, strict=True), strict=True))
    for each in groups:
        ranks = each.ranks or range(len(each.responses))
        for (better, rank), (worse, other) in itertools.combinations(zip(each.responses, ranks, strict=True), 2):
            strength = _strength(each) if len(ranks) == 2 else other - rank
            (first, first_length), (second, second_length) = known[better], known[worse]
            found.comparisons.add(lines[0], key, first, second, first_length, second_length, strength)


def _strength(pair: Preference) -> float:
    return 0.0 if pair.ranks else pair.margin or 1.0
