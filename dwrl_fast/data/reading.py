"""Reads preferences from any source, row by row, and accounts for every row."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dwrl_fast.data.binary import pair, pair_with_magnitude
from dwrl_fast.data.columns import Columns, Unusable
from dwrl_fast.data.formats import (
    BINARYMAGN,
    DEMONSTRATION,
    RANKING,
    SINGLE,
    Format,
    check_first,
    check_mapping,
    guess,
    recognise,
    unrecognised,
)
from dwrl_fast.data.judgements import demonstration
from dwrl_fast.data.layouts import asked_for, choose, names_of, renamed
from dwrl_fast.data.locations import open_rows
from dwrl_fast.data.preference import Dataset, Preference, Rankings, Ties
from dwrl_fast.data.rankings import Groups, ranking
from dwrl_fast.data.remarks import Unread, noted, unread_columns
from dwrl_fast.data.row_source import START, Position, Row, RowSource
from dwrl_fast.data.singles import Key, Single, compare_singles, single
from dwrl_fast.errors import DataError
from dwrl_fast.log import info_once

NONE: Mapping[str, int] = MappingProxyType({})


class Outcome(NamedTuple):
    """The outcome of one row, or of the rows of one prompt if each row holds one completion.

    Either `error` is set (a malformed row; most callers raise it), or each row is used in `preferences` or listed in
    `dropped` with its reason. `notes` are as in Dataset. Reading from `after` continues behind this outcome (except if
    completions of one prompt are collected from the whole file: then all outcomes come at the end).
    """

    after: Position
    preferences: Sequence[Preference] = ()
    dropped: Sequence[tuple[str, int]] = ()
    notes: Mapping[str, int] = NONE
    error: DataError | None = None
    lines: Sequence[int] = ()  # of the rows that `preferences` come from


class Reader:
    """Reads a source as preferences. Can be iterated again from any position that an Outcome gave.

    columns: our column names -> names in the file. ties, rankings: as the options of the same names. consecutive:
    compare completions of one prompt only if their rows are adjacent, so that one prompt at a time is in memory;
    otherwise rows of one prompt may be anywhere, and all are held in memory until the last one is read. layout: the
    layout of the file (see `layouts`); None: detected from its first row. aspect: the aspect to judge, if a layout has
    scores by aspect. best_only: of several ranked or scored responses to a prompt, read only the best, and those that
    tie with it, each once: for a model that imitates them.

    `format`, and `layout` if the file has one, are known once a row has been read. `aspects`: those that the
    last row has scores of; `scored_by`: the one whose scores were read.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        columns: Mapping[str, str] | None = None,
        ties: Ties = "drop",
        rankings: Rankings = "pairs",
        consecutive: bool = False,
        layout: str | None = None,
        aspect: str | None = None,
        best_only: bool = False,
    ) -> None:
        self.source, self.columns, self.ties, self.rankings = source, dict(columns or {}), ties, rankings
        self.consecutive, self.aspect, self.best_only = consecutive, aspect, best_only
        self.aspects: tuple[str, ...] = ()
        self.scored_by: str | None = None
        self.nulls = getattr(source, "table", False)
        self.format: Format | None = None
        self.layout = asked_for(layout)
        self.decided = layout is not None  # whether `layout` is final (None: the file has no layout)
        check_mapping(self.columns, names_of())
        self.mapping = tuple(self.columns.items())
        self.before, self.last = Unread(), Unread()  # not read: in the rows before the last one, and in that row

    def read(self, start: Position = START) -> Iterator[Outcome]:
        """The outcome of each row, in order. Raises DataError if the source cannot be read further."""
        prompts: dict[Key, list[Single]] = {}
        waiting: list[tuple[str, int]] = []  # rows dropped while a prompt is incomplete
        held: Counter[str] = Counter()  # notes about such rows
        after = start
        for row in self.source.rows(start):
            try:
                form, columns, said = self._recognised(row)
                if form is SINGLE:
                    completion = single(columns, row.line)
                    if self.consecutive and completion.key not in prompts:
                        yield from self._compared(prompts, waiting, held, after)
                    prompts.setdefault(completion.key, []).append(completion)
                    held.update(said)
                else:
                    preferences, notes = self._groups(form, columns)
                    looks = noted(preferences[0])
                    if said or looks:
                        notes = Counter(notes) + Counter([*said, *looks])
                    yield Outcome(row.after, preferences, notes=notes, lines=(row.line,))
            except Unusable as reason:
                dropped = (str(reason), row.line)
                if prompts:
                    waiting.append(dropped)
                else:
                    yield Outcome(row.after, dropped=[dropped])
            except DataError as error:
                if row.place and row.place not in str(error):
                    error = DataError(f"{error} ({row.place})")
                yield Outcome(row.after, error=error)
            after = row.after
        yield from self._compared(prompts, waiting, held, after)

    def groups_of(self, line: int) -> Sequence[Preference]:
        """The groups of one line (Parquet and `datasets`: of one row), independent of the lines after it and their
        format. For SINGLE, whose rows are compared with others, the one response. Raises DataError if the line has
        nothing usable.
        """
        row = next((row for row in self.source.rows() if row.line >= line), None)
        if row is None or row.line > line:
            raise DataError(f"{self.source.name}:{line}: there is no row on that line")
        try:
            form, columns, _ = self._recognised(row)
            if form is SINGLE:
                return [single(columns, line).preference(columns.source)]
            return self._groups(form, columns)[0]
        except Unusable as reason:
            raise DataError(f"{self.source.name}:{line} holds no usable row: {reason}") from None

    @property
    def unread(self) -> Unread:
        """The columns and fields that were not read, in all rows so far."""
        found = Unread()
        found.update(self.before)
        found.update(self.last)
        return found

    def decide(self, values: Mapping[str, Any], source: str) -> None:
        """Determine the layout of the file from this row. Raises DataError if several layouts fit."""
        self.layout = choose(renamed(values, self.columns), source)
        self.decided = self.layout is not None or recognise(tuple(values), self.mapping) is not None
        if self.layout is not None:
            info_once(f"{self.source.name}: read as {self.layout.title} (--layout {self.layout.names})")

    def _recognised(self, row: Row) -> tuple[Format, Columns, Sequence[str]]:
        """The format (the same as in earlier rows), the row's columns, and notes. Raises DataError, Unusable."""
        if self.last:
            self.before.update(self.last)
            self.last = Unread()
        if isinstance(row.values, DataError):
            raise row.values
        source = f"{self.source.name}:{row.line}"
        if not self.decided:
            self.decide(row.values, source)
        if self.layout is None:
            form = self._own(row.values, source)
            if extra := unread_columns(tuple(row.values), form, self.mapping):
                self.last.add(row.values, extra)
            return form, Columns(row.values, source, self.columns, self.nulls, self.last.fields), ()
        first = self.format is None
        form, values, read = self.layout.row(row.values, source, self.aspect, self.columns, first=first)
        self.aspects, self.scored_by = read.aspects, read.scored_by
        self._check_format(form, source)
        self.last.add(read.values, tuple(name for name in read.values if name not in read.read))
        return form, Columns(values, source, {}, self.nulls, self.last.fields), [*read.notes.elements()]

    def _own(self, values: Mapping[str, Any], source: str) -> Format:
        """The format of a row without layout. Raises DataError."""
        form = recognise(tuple(values), self.mapping)
        if form is None:  # reading it in its probable format reports the missing column
            form = self.format or guess(values, self.columns)
            if form is None:
                raise unrecognised(values, source)
            return form
        if self.format is None:
            check_first(form, values, self.columns, source)
        self._check_format(form, source)
        return form

    def _check_format(self, form: Format, source: str) -> None:
        """Raises DataError if earlier rows have a different format."""
        if self.format is None:
            self.format = form
            if form is SINGLE and not self.consecutive:
                info_once(f"{self.source.name}: completions are held in memory until the last one is read")
        elif form is not self.format:
            raise DataError(
                f"{source}: the columns of a {form.name} row, but the rows before it are {self.format.name}; put the "
                "two in separate files"
            )

    def _groups(self, form: Format, columns: Columns) -> Groups:
        if form is RANKING:
            return ranking(columns, self.ties, self.rankings, best_only=self.best_only)
        if form is DEMONSTRATION:
            return [demonstration(columns)], NONE
        return [pair_with_magnitude(columns, self.ties) if form is BINARYMAGN else pair(columns, self.ties)], NONE

    def _compared(
        self, prompts: dict[Key, list[Single]], dropped: list[tuple[str, int]], held: Counter[str], after: Position
    ) -> Iterator[Outcome]:
        """The pairs of the held prompts and the rows dropped in the meantime. Clears both."""
        while prompts:
            rows = prompts.pop(next(iter(prompts)))
            found = compare_singles(rows, self.source.name, self.ties, best_only=self.best_only)
            (preferences, notes), alone = found
            lines = sorted({row.line for row in rows}.difference(line for _, line in alone))
            if held:
                notes = Counter(notes) + held
            yield Outcome(after, preferences, [*dropped, *alone], notes, lines=lines)
            dropped.clear()
            held.clear()


def read_preferences(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    ties: Ties = "drop",
    rankings: Rankings = "pairs",
    layout: str | None = None,
    aspect: str | None = None,
    best_only: bool = False,
) -> Dataset:
    """The preferences of a file or data set (see `open_rows`) of any format. limit: use only the first usable rows
    (SINGLE: prompts), this many.

    `columns` maps our column names to those of the file; `layout`, `aspect`, `ties` and `rankings` are as the options
    of the same names, and `best_only` is as for `Reader`. Rows without a comparison are dropped and counted with their
    lines. Raises DataError, which names file and line, if the file or a row is malformed, or if no usable row is left.
    """
    reader = Reader(
        open_rows(path),
        columns=columns,
        ties=ties,
        rankings=rankings,
        layout=layout,
        aspect=aspect,
        best_only=best_only,
    )
    dataset = Dataset(reader.source.name)
    used = 0
    for outcome in reader.read():
        if outcome.error is not None:
            raise outcome.error
        dataset.add(outcome.preferences, outcome.dropped, outcome.notes)
        used += bool(outcome.preferences)
        if used == limit:
            break
    dataset.unread = reader.unread
    dataset.format = reader.format.name if reader.format is not None else ""
    if not dataset.rows:
        raise DataError(f"no usable row: {dataset.summary}")
    return dataset
