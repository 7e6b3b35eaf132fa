"""Finds the source for a name: a file, several files, a folder, a pipe, or a data set of the hub."""

import glob
import os
import re
import zlib
from pathlib import Path

from dwrl_fast.data.compression import opened
from dwrl_fast.data.delimited import Delimited
from dwrl_fast.data.json_array import JsonArray
from dwrl_fast.data.jsonl import BOM, JsonLines
from dwrl_fast.data.row_source import RowSource
from dwrl_fast.data.several import STANDARD_INPUT, Several, is_pipe, spooled
from dwrl_fast.data.tables import HubDataset, Parquet, SavedDataset
from dwrl_fast.errors import DataError

HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]+){0,2}")
PACKED = (".gz", ".bz2", ".zst")
FILES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = b"PAR1"
ARRAY = re.compile(rb"\s*\[\s*(\{|\]|\Z)")  # the start of an array of objects; a line with any other array is not a row
HEADER = re.compile(rb'"?\w[\w .-]*"?(?:([,\t])"?\w[\w .-]*"?(?:\1"?\w[\w .-]*"?)*)')  # at least two column names
SPLITS = re.compile(r"(?<![a-z])(train|training|test|testing|valid|validation|dev|eval)(?![a-z])", re.I)


def open_rows(name: str | Path) -> RowSource:
    """The rows of `name`. A name can be: JSON lines, a JSON array, CSV or TSV (each plain or compressed by gzip, bzip2
    or zstd), or a Parquet file; several files (a pattern like `part-*.jsonl`, names separated by commas, or a folder
    that holds them); standard input (-) or a named pipe; a folder that `datasets` saved (FOLDER or FOLDER:SPLIT); a
    data set of the hub (NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; the default split is train). Local files have priority
    over the hub. Raises DataError if it is none of these.
    """
    path, name = Path(name), str(name)
    if os.path.isdir(name):  # unlike Path.is_dir, no error if the name is not a valid file name
        return _folder(path, name, None)
    if is_pipe(name):
        return _file(spooled(name), name)
    if os.path.exists(name):
        return _file(path, name)
    if files := files_of(name):
        return Several(name, [_file(Path(file), file) for file in files])
    if name == STANDARD_INPUT or _suffix(path) in FILES or path.suffix in PACKED:
        return _file(path, name)
    before, _, split = name.rpartition(":")
    if before and os.path.isdir(before):
        return _folder(Path(before), name, split)
    if HUB.fullmatch(name):
        return HubDataset(name)
    return JsonLines(path)  # reading it will report that there is no such file


def files_of(name: str) -> list[str]:
    """The files that `name` means if it is not a file itself: the files of a pattern, of a folder or of a split in it,
    or several names separated by commas. None if it is something else. Raises DataError if a folder holds files of
    several kinds.
    """
    if "\0" in name or os.path.isfile(name):
        return []
    folder, split = (name, None) if os.path.isdir(name) else (name.rpartition(":")[0], name.rpartition(":")[2])
    if folder and os.path.isdir(folder):
        return [] if _is_saved(Path(folder)) else _shards(Path(folder), name, split)
    if "," in name and all(os.path.isfile(part) for part in name.split(",")):
        return name.split(",")
    found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    return [file for file in found if os.path.isfile(file)]


def _folder(path: Path, name: str, split: str | None) -> RowSource:
    if _is_saved(path):
        return SavedDataset(path, name, split)
    files = files_of(name)
    if not files:
        named = "" if split is None else f" with '{split}' in their names"
        raise DataError(
            f"{name}: cannot be read: it is a folder that datasets.save_to_disk did not write, and it has no data "
            f"files{named}; name a file in it"
        )
    return Several(name, [_file(Path(file), file) for file in files])


def _is_saved(path: Path) -> bool:
    return any((path / file).exists() for file in ("dataset_dict.json", "state.json"))


def _shards(path: Path, name: str, split: str | None) -> list[str]:
    """The files of a folder, which must all have one kind and one split; or the files of the given split."""
    files = _data_files(path)
    if split is not None:
        return [file for file in files if split.lower() in _splits(file)]
    kinds = sorted({_suffix(Path(file)) for file in files})
    splits = sorted({split for file in files for split in _splits(file)})
    if len(kinds) > 1 or len(splits) > 1:
        what = f"files of several kinds ({', '.join(kinds)})" if len(kinds) > 1 else f"the splits {', '.join(splits)}"
        pattern = f"{path}/*{kinds[0]}" if len(kinds) > 1 else f"{path}/*{splits[-1]}*"
        raise DataError(f"{name}: cannot be read: the folder holds {what}; name a file, or some of them: '{pattern}'")
    return files


def _splits(file: str) -> list[str]:
    return [found.lower() for found in SPLITS.findall(Path(file).name)]


def _data_files(path: Path) -> list[str]:
    try:
        return sorted(
            str(file)
            for file in path.iterdir()
            if file.is_file() and _suffix(file) in FILES and file.name[0] not in "._"
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _suffix(path: Path) -> str:
    """The suffix of the row format, without that of the compression."""
    return (Path(path.stem) if path.suffix in PACKED else path).suffix


def _file(path: Path, name: str) -> RowSource:
    suffix = _suffix(Path(name))
    start = b"" if suffix in SEPARATORS else _start(path)
    separator = SEPARATORS.get(suffix) or (_separator(start) if suffix not in FILES else None)
    if separator is not None:
        return Delimited(path, separator, name)
    if start.startswith(PARQUET):
        return Parquet(path, name)
    return JsonArray(path, name) if ARRAY.match(start.removeprefix(BOM)) else JsonLines(path, name)


def _separator(start: bytes) -> str | None:
    """The separator in the first line of a table, if the file name does not tell it; None if it is not a table."""
    line = start.removeprefix(BOM).split(b"\n")[0].strip()
    if not HEADER.fullmatch(line):
        return None
    return "\t" if b"\t" in line else ","


def _start(path: Path) -> bytes:
    """The first bytes of a file, uncompressed; empty if it cannot be read, which a later read will report."""
    try:
        with opened(path) as file:
            return file.read(4096)
    except (OSError, EOFError, ValueError, DataError, zlib.error):
        return b""
