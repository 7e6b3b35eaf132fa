"""Examines a file: it accounts for every row, and reports lengths, repeated and contradicting labels, and what two
files share.

Several processes read a large JSONL file, each one a part of it. The result is the same as that of one process.
"""

import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.compression import kind_of
from dwrl_fast.data.counts import Counts, Measure, characters, count_rows
from dwrl_fast.data.formats import BINARY, SINGLE, Format, check_first, recognise
from dwrl_fast.data.jsonl import JsonLines, finite
from dwrl_fast.data.label_agreement import Agreement, agreement
from dwrl_fast.data.locations import open_rows
from dwrl_fast.data.preference import Rankings, Ties
from dwrl_fast.data.reading import Reader
from dwrl_fast.data.remarks import Unread
from dwrl_fast.data.row_source import Position
from dwrl_fast.errors import DataError

STRETCH = 16 * 2**20  # bytes that one process reads at a time
PERCENTILES = (0, 5, 50, 95, 99, 100)
MIX, THREE = np.uint64(0x9E3779B97F4A7C15), np.uint64(3)

Progress = Callable[[int], None]


class Percentiles(NamedTuple):
    """Minimum, percentiles and maximum, in `FileReport.unit`."""

    least: int
    p5: int
    p50: int
    p95: int
    p99: int
    most: int


@dataclass
class FileReport:
    """The report on one file. rows = used + dropped. `dropped` maps each reason to its lines, `advice` to the reader's
    message for the first of them.

    repeated: lines whose comparison (prompt, aspect and two responses) has the same winner as in an earlier line;
    conflicts: lines of comparisons that have both winners. shared_prompts: lines whose prompt occurs in an earlier
    line; longer_wins: the share of untied pairs in which the longer response wins, equal lengths counting one half.
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
    unread: Unread
    layout: str
    counts: Counts

    def to_dict(self) -> dict[str, Any]:
        """As JSON: everything except the counts; NaN becomes null."""
        values = {name: value for name, value in vars(self).items() if name != "counts"}
        values["lengths"] = {name: found._asdict() for name, found in self.lengths.items()}
        values["agreement"] = self.agreement and asdict(self.agreement)
        values["unread"] = self.unread.to_dict()
        return finite(values)


@dataclass
class Overlap:
    """What two files share. first_lines, second_lines: rows whose prompt occurs in the other file. agreement: between
    the labels of the comparisons in both files, using the first label in each file.
    """

    prompts: int
    first_lines: list[int]
    second_lines: list[int]
    agreement: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; NaN becomes null."""
        return finite(asdict(self))


def check(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    rankings: Rankings = "pairs",
    layout: str | None = None,
    aspect: str | None = None,
    measure: Measure | None = None,
    processes: int | None = None,
    stretch: int = STRETCH,
    progress: Progress | None = None,
) -> FileReport:
    """Read a whole file or data set (see `open_rows`) and report its content.

    columns, ties, rankings, layout, aspect: as the options of the same names. measure: measures lengths in tokens;
    without it lengths are in characters. processes: the maximum number of processes if lengths are in characters; by
    default the number of cores. progress: called with the bytes read (JSONL) or the rows read. Raises DataError if the
    file cannot be read to its end.
    """
    reader = Reader(open_rows(path), columns=columns, ties=ties, rankings=rankings, layout=layout, aspect=aspect)
    processes = processes or _cores()
    counts = None
    if measure is None and processes > 1 and isinstance(reader.source, JsonLines):
        counts = _in_parallel(reader, processes, stretch, progress)
    if counts is None:
        counts = count_rows(reader, measure=measure or characters, progress=progress)
    return summarise(counts, reader, "characters" if measure is None else "tokens")


def _count_stretch(reader: Reader, bounds: tuple[int, int]) -> Counts:
    start, end = bounds
    return count_rows(reader, Position(0, start), end)


def _in_parallel(reader: Reader, processes: int, size: int, progress: Progress | None) -> Counts | None:
    """The counts of all parts of a JSONL file; None if one process must read the file."""
    assert isinstance(reader.source, JsonLines)
    stretches = list(itertools.pairwise(_bounds(reader.source.path, size)))
    form = _format(reader) if len(stretches) > 1 else None
    if form is None or form is SINGLE:  # SINGLE compares rows from anywhere in the file
        return None
    reader.format, whole = form, Counts()
    with _pool(min(processes, len(stretches))) as pool:
        counted = pool.imap(functools.partial(_count_stretch, reader), stretches)
        for (_, end), found in zip(stretches, counted, strict=True):
            whole.extend(found)
            if progress is not None:
                progress(end)
    return whole


def _bounds(name: str | Path, size: int) -> Iterator[int]:
    """Offsets of rows about every `size` bytes, and the end of the file; nothing for a file that must be read
    sequentially.
    """
    try:
        with open(name, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            if kind_of(name) is not None or end < 2 * size:
                return
            place = 0
            while place < end:
                yield place
                file.seek(place + size)
                file.readline()
                while (line := file.readline()).isspace():  # blank lines belong to the part before them
                    pass
                place = file.tell() - len(line)
            yield end
    except (OSError, ValueError):
        return  # reading it sequentially will report the error


def _format(reader: Reader) -> Format | None:
    """The format of the first row that has one; None if the reader could decide differently."""
    for row in reader.source.rows():
        if isinstance(row.values, DataError):
            continue
        try:
            if not reader.decided:
                reader.decide(row.values, f"{reader.source.name}:{row.line}")
            if reader.layout is not None:
                if reader.layout.form in (BINARY, SINGLE):  # a layout may turn BINARY rows into BINARYMAGN
                    return None
                return reader.layout.row(row.values, "", reader.aspect, reader.columns, first=True)[0]
            if form := recognise(tuple(row.values), reader.mapping):
                check_first(form, row.values, reader.columns, "")
                return form
        except Unusable:
            continue
        except DataError:
            return None
    return None


def _pool(processes: int) -> Pool:
    """A pool of processes, forked if that is safe: forking is fast, while starting Python again takes a tenth of the
    time to read a gigabyte. Only the waiting process handles an interrupt.
    """
    alone = sys.platform == "linux" and threading.active_count() == 1
    context = multiprocessing.get_context("fork" if alone else "spawn")
    return context.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def _cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summarise(found: Counts, reader: Reader, unit: str) -> FileReport:
    """The report from the counts of a whole file."""
    rows, comparisons = found.rows.all, found.comparisons.all
    keys, strengths = _labels(comparisons)
    longer = np.sign(comparisons["first_length"] - comparisons["second_length"])[strengths != 0]
    several = np.isin(keys, keys[_later(keys)])  # usually none, which saves the work below
    keys, strengths, lines = keys[several], strengths[several], comparisons["line"][several]
    winners = np.sign(strengths)
    contradicted = np.isin(keys, np.intersect1d(keys[winners > 0], keys[winners < 0]))
    later = _later(rows["prompt"])
    return FileReport(
        path=reader.source.name,
        format="" if reader.format is None else reader.format.name,
        rows=found.read,
        used=found.used,
        groups=found.groups,
        dropped={
            reason: sorted(lines)
            for reason, lines in sorted(found.dropped.items(), key=lambda item: len(item[1]), reverse=True)
        },
        advice={reason: said for reason, said in found.advice.items() if said},
        notes=dict(found.notes.most_common()),
        unit=unit,
        lengths={
            name: Percentiles(*map(int, np.percentile(values, PERCENTILES)))
            for name, values in lengths_of(found).items()
            if len(values)
        },
        prompts=int(len(rows) - later.sum()),
        shared_prompts=_lines(rows["line"][later]),
        repeated=_lines(lines[_later(keys * THREE + (winners + 1).astype(np.uint64))]),
        conflicts=_lines(lines[contradicted]),
        pairs=len(longer),
        longer_wins=float((1 + longer.mean()) / 2) if len(longer) else math.nan,
        agreement=agreement(keys, strengths),
        unread=found.unread,
        layout="" if reader.layout is None else reader.layout.names,
        counts=found,
    )


def lengths_of(found: Counts) -> dict[str, np.ndarray]:
    """The lengths of prompts, of responses, and of each prompt together with its longest response."""
    rows = found.rows.all
    whole = rows["length"] + rows["longest"]
    return {"prompt": rows["length"], "response": np.array(found.responses), "prompt + longest response": whole}


def find_overlap(first: FileReport, second: FileReport) -> Overlap:
    """The prompts and comparisons that two files share."""
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
    """A number for each comparison that does not depend on the winner, and its strength, which is negative if the
    winner is the response with the greater digest.
    """
    first, second = comparisons["first"], comparisons["second"]
    keys = comparisons["key"]
    for part in (np.minimum(first, second), np.maximum(first, second)):
        keys = (keys ^ (keys >> np.uint64(29))) * MIX + part
    return keys, np.where(first < second, comparisons["strength"], -comparisons["strength"]).astype("f4")


def _later(values: np.ndarray) -> np.ndarray:
    """A mask: True if an equal value occurs earlier."""
    later = np.ones(len(values), bool)
    later[np.unique(values, return_index=True)[1]] = False
    return later


def _lines(lines: np.ndarray) -> list[int]:
    return np.unique(lines).tolist()
