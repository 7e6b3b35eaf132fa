"""Writes the papers' data sets from their public files, and on-topic pairs from any file, as train.jsonl and
test.jsonl. No prompt occurs in both files.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dwrl_fast.data.columns import Unusable, quoted
from dwrl_fast.data.counts import prompt_digest
from dwrl_fast.data.on_topic import on_topic
from dwrl_fast.data.published import DATA_SETS, DataSet
from dwrl_fast.data.reading import Reader
from dwrl_fast.data.row_source import START, Position, Row
from dwrl_fast.data.split import Split
from dwrl_fast.data.tables import library, readable
from dwrl_fast.errors import ConfigError, DataError

ON_TOPIC, ON_TOPIC_TEST_ROWS = "on-topic", 500
FILES = ("train.jsonl", "test.jsonl", "prepared.json")
REMEDY = "check that this machine can reach it, or give a local copy with --source"

PublishedRows = Iterable[Mapping[str, Any]]


def refuse_written(folder: Path) -> None:
    """Raises ConfigError if an output file already exists."""
    for name in FILES:
        if (folder / name).exists():
            raise ConfigError(f"--output_dir {folder} holds {name} already, and nothing is overwritten; name another")


def prepare_data_set(
    name: str,
    folder: Path,
    *,
    source: str | None = None,
    seed: int = 0,
    train_rows: int | None = None,
    test_rows: int | None = None,
    longest: int | None = None,
) -> dict[str, Split]:
    """Write the data set `name` of DATA_SETS to `folder`: train.jsonl, test.jsonl and an account of the rows in
    prepared.json. The name ON_TOPIC makes pairs from any preference file (see on_topic.py, also for `longest`).

    source: a copy of the repository, or one file of published rows (some prompts are then held out for the test); None:
    the hub, or the published address. The rows are drawn with `seed`, whole prompts at a time: as many as in the
    papers, or `train_rows` and `test_rows`. Raises DataError if the files cannot be read, have a different schema, or
    have no usable rows.
    """
    refuse_written(folder)
    where, most, found = _paired(source, seed, longest) if name == ON_TOPIC else _published(name, source)
    train, test = found["train"], found.get("test")
    draw = random.Random(f"{name} {seed}")
    if test is None:  # hold out prompts of the one file
        test = found["test"] = Split(prompts=train.prompts)
    else:
        test.not_drawn = _count(test.prompts)
    tested = test.draw(test.prompts, test_rows or most.test, draw)
    left = {prompt: lines for prompt, lines in train.prompts.items() if prompt not in tested}
    trained = train.draw(left, train_rows or most.train, draw)
    test.not_drawn = max(0, test.not_drawn - test.written)
    train.withheld = _count(train.prompts) - _count(left)
    train.not_drawn = _count(left) - train.written
    if not (train.written and test.written):
        raise DataError(f"{where}: too few usable rows for a training and a test file")
    folder.mkdir(parents=True, exist_ok=True)
    for file, groups in (("train.jsonl", trained), ("test.jsonl", tested)):
        with open(folder / file, "x", encoding="utf-8") as out:
            out.writelines(line + "\n" for lines in groups.values() for line in lines)
    account = {"data_set": name, "source": where, "seed": seed}
    with open(folder / "prepared.json", "x", encoding="utf-8") as out:
        json.dump(account | {split: made.to_dict() for split, made in found.items()}, out, indent=1)
    return found


class _Most(NamedTuple):
    """Default numbers of rows to draw; None: all."""

    train: int | None
    test: int | None


def _paired(source: str | None, seed: int, longest: int | None) -> tuple[str, _Most, dict[str, Split]]:
    if source is None:
        raise ConfigError("--prepare on-topic: give --source, a file of preferences to take the responses from")
    return source, _Most(None, ON_TOPIC_TEST_ROWS), {"train": on_topic(source, seed, longest)}


def _published(name: str, source: str | None) -> tuple[str, _Most, dict[str, Split]]:
    data, where = DATA_SETS[name], source or str(DATA_SETS[name].repository)
    rows = _load(name, source, where)
    found = {split: _read(Converted(some, data, f"{name}:{split}", where)) for split, some in rows.items()}
    return where, _Most(data.train_rows, data.test_rows), found


def _count(prompts: Mapping[int, list[str]]) -> int:
    return sum(map(len, prompts.values()))


def _load(name: str, source: str | None, where: str) -> dict[str, PublishedRows]:
    """The published rows of each split, read lazily."""
    data = DATA_SETS[name]
    path, files = source or data.repository, dict(data.files)
    if path is None:
        raise ConfigError(
            f"--prepare {name}: it is not on the hub; get it with `{data.address}` and give the folder as --source"
        )
    if source is not None and Path(source).is_dir():
        files = {split: pattern for split, pattern in files.items() if any(Path(source).glob(pattern))}
        if "train" not in files:
            raise DataError(f"--source {source}: the folder has no {data.files['train']}; is it a copy of {name}?")
        path = str(Path(source).resolve())  # a relative name could be that of a `datasets` reader
    elif source is not None or path.startswith("https://"):
        path, files = "parquet" if path.endswith(".parquet") else "json", {"train": path}
    datasets = library("datasets", name)
    with readable(where, REMEDY):
        return datasets.load_dataset(path, data_files=files, streaming=True)


class Converted:
    """A RowSource of converted rows. `made` yields each row with the number of the published row that it comes from."""

    def __init__(self, published: PublishedRows, data: DataSet, name: str, where: str) -> None:
        self.published, self.data, self.name, self.where = published, data, name, where
        self.read = 0
        self.made: dict[int, tuple[int, dict[str, Any]]] = {}
        self.unusable: list[tuple[str, int]] = []
        self.notes: Counter[str] = Counter()

    def rows(self, start: Position = START) -> Iterator[Row]:
        """All rows, numbered from 1. Raises DataError if the published rows cannot be read further."""
        line = 0
        with readable(self.where, REMEDY):
            for row in self.published:
                self.read += 1
                for values in self._convert(row):
                    line += 1
                    self.made[line] = self.read, values
                    yield Row(line, values, Position(line))

    def _convert(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            return self.data.rows(row, self.notes)
        except Unusable as reason:
            self.unusable.append((str(reason), self.read))
            return []
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{self.name}, row {self.read}: the row does not have the published form ({type(error).__name__}: "
                f"{error}); its columns are {quoted(row)}. Check that it is the right file"
            ) from error


def _read(source: Converted) -> Split:
    """Check every published row with the reader that later reads the written files."""
    found, used = Split(), set[int]()
    for outcome in Reader(source).read():
        if outcome.error is not None:
            raise outcome.error
        for reason, line in outcome.dropped:
            source.unusable.append((reason, source.made.pop(line)[0]))
        for line in outcome.lines:
            number, values = source.made.pop(line)
            used.add(number)
            lines = found.prompts.setdefault(prompt_digest(outcome.preferences[0].prompt), [])
            lines.append(json.dumps(values, ensure_ascii=False))
    found.read, found.used, found.notes = source.read, len(used), source.notes
    for reason, number in source.unusable:
        if number in used:
            found.notes[f"left out of the rows that one published row makes: {reason}"] += 1
        else:
            used.add(number)
            found.drop(reason, number)
    return found
