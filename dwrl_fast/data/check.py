"""What is in a file: every row accounted for, lengths, repeated and contradicting labels, what two files share.

A JSONL file of some size is read by several processes, each a stretch of it; the result is that of one.
"""

import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwrl_fast.data.counts import Counts, Measure, characters, count_rows
from dwrl_fast.data.formats import FORMATS, SINGLE, Format, check_first, recognise
from dwrl_fast.data.jsonl import GZIP, JsonLines
from dwrl_fast.data.label_agreement import Agreement, agreement
from dwrl_fast.data.locations import open_rows
from dwrl_fast.data.preference import Rankings, Ties
from dwrl_fast.data.reading import Reader
from dwrl_fast.data.row_source import Position, RowSource
from dwrl_fast.errors import DataError

STRETCH = 16 * 2**20  # bytes that a process reads at a time
PERCENTILES = (0, 5, 50, 95, 99, 100)
MIX, THREE = np.uint64(0x9E3779B97F4A7C15), np.uint64(3)

Progress = Callable[[int], None]


class Percentiles(NamedTuple):
    """In `FileReport.unit`: the least, percentiles, the most."""

    least: int
    p5: int
    p50: int
    p95: int
    p99: int
    most: int


@dataclass
class FileReport:
    """One file. rows = used + dropped. `dropped` has the lines of each reason, `advice` what the reader
    said of the first of them.

    repeated: lines whose comparison (prompt, aspect and two responses) has the same winner in an earlier one;
    conflicts: lines of comparisons that have both winners. shared_prompts: lines whose prompt has an earlier one's;
    longer_wins: the share of untied pairs in which the longer response wins, equal lengths counting one half.
    """

    path: str
    format: str
    rows: int
    used: int
    groups: int
    dropped: dict[str, list[int]]
    advice: dict[str, str]
    notes: dict[str, int]
    unit: str
    lengths: dict[str, Percentiles]
    prompts: int
    shared_prompts: list[int]
    repeated: list[int]
    conflicts: list[int]
    pairs: int
    longer_wins: float
    agreement: Agreement | None
    counts: Counts

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the counts; NaN as null."""
        values = {name: value for name, value in vars(self).items() if name != "counts"}
        values["lengths"] = {name: found._asdict() for name, found in self.lengths.items()}
        values["longer_wins"] = None if math.isnan(self.longer_wins) else self.longer_wins
        values["agreement"] = _plain(self.agreement)
        return values


@dataclass
class Overlap:
    """What two files share. first_lines, second_lines: rows whose prompt the other file has; agreement: between the
    labels of the comparisons that both have, the first of each file.
    """

    prompts: int
    first_lines: list[int]
    second_lines: list[int]
    agreement: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"agreement": _plain(self.agreement)}


def check(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    rankings: Rankings = "pairs",
    measure: Measure | None = None,
    processes: int | None = None,
    stretch: int = STRETCH,
    progress: Progress | None = None,
) -> FileReport:
    """Read the whole of a file or data set (see `open_rows`) and say what is in it.

    columns, ties, rankings: as the options of the same names. measure: lengths in tokens; characters without it.
    processes: as many as may run at once where lengths are in characters, by default the cores there are. progress is
    told how much further it is, in bytes of JSONL or else in rows. Raises DataError where it cannot be read to its end.
    """
    source = open_rows(path)
    settings = Settings(source.name, dict(columns or {}), ties, rankings)
    processes = processes or _cores()
    found = None
    if measure is None and processes > 1 and isinstance(source, JsonLines):
        found = _in_parallel(source, settings, processes, stretch, progress)
    form = None if found is None else found[0]
    if found is None:
        reader = settings.reader(source)
        told = _difference(progress, isinstance(source, JsonLines)) if progress is not None else None
        whole = count_rows(reader, measure=measure or characters, progress=told)
        form = reader.format
    else:
        whole = found[1]
    return summarise(
        whole, source.name, "" if form is None else form.name, "characters" if measure is None else "tokens"
    )


class Settings(NamedTuple):
    """How a file is read; goes to other processes."""

    name: str
    columns: dict[str, str]
    ties: Ties
    rankings: Rankings

    def reader(self, source: RowSource) -> Reader:
        return Reader(source, columns=self.columns, ties=self.ties, rankings=self.rankings)


class Stretch(NamedTuple):
    """A part of a JSONL file between two rows' beginnings, and what its rows are."""

    settings: Settings
    format: str
    start: int
    end: int


def _count_stretch(stretch: Stretch) -> Counts:
    reader = stretch.settings.reader(JsonLines(stretch.settings.name))
    reader.format = next(form for form in FORMATS if form.name == stretch.format)
    return count_rows(reader, Position(0, stretch.start), stretch.end)


def _in_parallel(
    source: JsonLines, settings: Settings, processes: int, size: int, progress: Progress | None
) -> tuple[Format, Counts] | None:
    """The format, and the counts of all stretches; None where one process must read the file."""
    bounds = list(_bounds(source.name, size))
    form = _format(source, settings) if len(bounds) > 2 else None
    if form is None or form is SINGLE:  # SINGLE compares rows that may stand anywhere
        return None
    stretches = [Stretch(settings, form.name, *ends) for ends in itertools.pairwise(bounds)]
    whole = Counts()
    with _pool(min(processes, len(stretches))) as pool:
        for stretch, found in zip(stretches, pool.imap(_count_stretch, stretches), strict=True):
            whole.extend(found)
            if progress is not None:
                progress(stretch.end - stretch.start)
    return form, whole


def _bounds(name: str, size: int) -> Iterator[int]:
    """Where rows begin, about every `size` bytes, and the end; nothing for a file that has to be read in one go."""
    try:
        with open(name, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            if file.read(2) == GZIP or end < 2 * size:
                return
            place = 0
            while place < end:
                yield place
                file.seek(place + size)
                file.readline()
                while (line := file.readline()).isspace():  # blank lines go with the rows before them
                    pass
                place = file.tell() - len(line)
            yield end
    except (OSError, ValueError):
        return  # reading it in one go will say why


def _format(source: JsonLines, settings: Settings) -> Format | None:
    """What the rows are, which the first that is of any format says; None where the reader would have it otherwise."""
    for row in source.rows():
        if isinstance(row.values, DataError):
            continue
        form = recognise(tuple(row.values), tuple(settings.columns.items()))
        if form is not None:
            try:
                check_first(form, row.values, settings.columns, "")
            except DataError:
                return None
            return form
    return None


@contextmanager
def _pool(processes: int) -> Iterator[Any]:
    """Forked where that is safe: it takes no time, and starting Python anew is a tenth of reading a gigabyte. An
    interrupt is for the process that waits.
    """
    alone = sys.platform == "linux" and threading.active_count() == 1
    context = multiprocessing.get_context("fork" if alone else "spawn")
    with context.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield pool


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _difference(progress: Progress, in_bytes: bool) -> Callable[[Position], None]:
    before = 0

    def told(position: Position) -> None:
        nonlocal before
        now = position.offset if in_bytes else position.line
        progress(now - before)
        before = now

    return told


def summarise(found: Counts, path: str, form: str, unit: str) -> FileReport:
    """What the counts of a whole file say."""
    rows, comparisons = found.rows.all, found.comparisons.all
    longer = np.sign(comparisons["first_length"] - comparisons["second_length"])[comparisons["strength"] != 0]
    keys, strengths = _labels(comparisons)
    several = np.isin(keys, keys[_later(keys)])  # mostly none, which spares the rest its time
    keys, strengths, lines = keys[several], strengths[several], comparisons["line"][several]
    winners = np.sign(strengths)
    contradicted = np.isin(keys, np.intersect1d(keys[winners > 0], keys[winners < 0]))
    later = _later(rows["prompt"])
    return FileReport(
        path=path,
        format=form,
        rows=found.read,
        used=found.used,
        groups=found.groups,
        dropped={
            reason: found.dropped[reason].tolist() for reason in sorted(found.dropped, key=found.count, reverse=True)
        },
        advice={reason: said for reason, said in found.advice.items() if said},
        notes=dict(found.notes.most_common()),
        unit=unit,
        lengths={name: _lengths(values) for name, values in lengths_of(found).items() if len(values)},
        prompts=int(len(rows) - later.sum()),
        shared_prompts=_lines(rows["line"][later]),
        repeated=_lines(lines[_later(keys * THREE + (winners + 1).astype(np.uint64))]),
        conflicts=_lines(lines[contradicted]),
        pairs=len(longer),
        longer_wins=float((1 + longer.mean()) / 2) if len(longer) else math.nan,
        agreement=agreement(keys, strengths),
        counts=found,
    )


def lengths_of(found: Counts) -> dict[str, np.ndarray]:
    """The lengths of prompts, of responses, and of each prompt with the longest response to it."""
    rows = found.rows.all
    whole = rows["length"] + rows["longest"]
    return {"prompt": rows["length"], "response": found.responses.all, "prompt + longest response": whole}


def find_overlap(first: FileReport, second: FileReport) -> Overlap:
    """What two files have in common."""
    one, two = first.counts.rows.all, second.counts.rows.all
    in_one, in_two = np.isin(one["prompt"], two["prompt"]), np.isin(two["prompt"], one["prompt"])
    labels = []
    for found in (first, second):
        keys, strengths = _labels(found.counts.comparisons.all)
        keys, places = np.unique(keys, return_index=True)
        labels.append((keys, strengths[places]))
    keys, strengths = (np.concatenate(parts) for parts in zip(*labels, strict=True))
    return Overlap(
        prompts=len(np.unique(one["prompt"][in_one])),
        first_lines=_lines(one["line"][in_one]),
        second_lines=_lines(two["line"][in_two]),
        agreement=agreement(keys, strengths),
    )


def _labels(comparisons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each comparison, whichever response is the better, and its strength, negative where it is the one
    with the greater digest.
    """
    first, second = comparisons["first"], comparisons["second"]
    keys = comparisons["key"]
    for part in (np.minimum(first, second), np.maximum(first, second)):
        keys = (keys ^ (keys >> np.uint64(29))) * MIX + part
    return keys, np.where(first < second, comparisons["strength"], -comparisons["strength"])


def _later(values: np.ndarray) -> np.ndarray:
    """Where an equal value stands before."""
    ascending = np.sort(values)  # many times faster than the stable order, which is needed only where some are equal
    if not (ascending[1:] == ascending[:-1]).any():
        return np.zeros(len(values), bool)
    order = np.argsort(values, kind="stable")
    later = np.zeros(len(values), bool)
    later[order[1:]] = values[order[1:]] == values[order[:-1]]
    return later


def _lines(lines: np.ndarray) -> list[int]:
    return np.unique(lines).tolist()


def _lengths(values: np.ndarray) -> Percentiles:
    return Percentiles(*map(int, np.percentile(values, PERCENTILES)))


def _plain(found: Agreement | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {name: None if math.isnan(value) else value for name, value in asdict(found).items()}
