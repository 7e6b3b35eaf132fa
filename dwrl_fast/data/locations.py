"""Which source a name is: a file, a folder, or a data set of the hub."""

import os
import re
from pathlib import Path

from dwrl_fast.data.jsonl import JsonLines
from dwrl_fast.data.row_source import RowSource
from dwrl_fast.data.tables import HubDataset, Parquet, SavedDataset
from dwrl_fast.errors import DataError

HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]+){0,2}")
FILES = (".jsonl", ".json", ".gz", ".parquet")
PARQUET = b"PAR1"


def open_rows(name: str | Path) -> RowSource:
    """The rows of `name`: JSON lines (plain or gzipped), a Parquet file, a folder that `datasets` saved
    (FOLDER or FOLDER:SPLIT), or a data set of the hub (NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; the split train where
    none is named). What exists here goes before the hub. Raises DataError where it is none of these.
    """
    path, name = Path(name), str(name)
    if os.path.isdir(name):  # unlike Path.is_dir, no error where the name cannot be that of a file
        return _folder(path, name, None)
    if os.path.exists(name) or path.suffix in FILES:
        return Parquet(path) if _is_parquet(path) else JsonLines(path)
    before, _, split = name.rpartition(":")
    if before and os.path.isdir(before):
        return _folder(Path(before), name, split)
    if HUB.fullmatch(name):
        return HubDataset(name)
    return JsonLines(path)  # whose reading says that there is no such file


def _folder(path: Path, name: str, split: str | None) -> SavedDataset:
    if not any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{name}: cannot be read: a folder, and none that datasets.save_to_disk wrote; name a file in it"
        )
    return SavedDataset(path, name, split)


def _is_parquet(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == PARQUET
    except (OSError, ValueError):
        return False
