"""Checks folders before libraries read them, so that the libraries read only regular files of the folder itself."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from dwrl_fast.files.bounded import bounded_json, opened

HEADER = 32 << 20  # bytes: the names of a hundred thousand tensors
TEXT = 256 << 20  # bytes: a tokenizer of a million words is a tenth of it
CONFIG = 8 << 20  # bytes
LAYERS = 10_000
VOCABULARIES = ("tokenizer.json", "vocab.json")


def check_folder(name: str | Path) -> None:
    """Raise ValueError, which names the file, if a folder of a model, tokenizer or checkpoint holds something unsafe: a
    pipe or a device, a link to outside the folder, a header or a text that is too large, an index of files elsewhere,
    or too many layers. If `name` is a file, only a config is checked; any other name is ignored.
    """
    folder = Path(name)
    if folder.is_file():
        _check_config(folder)
    if not folder.is_dir():
        return
    for path in _files(folder):
        if path.suffix == ".safetensors":
            check_tensors(path)
        elif path.name.endswith(".index.json"):
            _check_index(path)
        elif path.name == "config.json":
            _check_config(path)
        elif path.suffix in (".json", ".jinja"):
            size, most = path.stat().st_size, TEXT if path.name in VOCABULARIES else CONFIG
            if size > most and path.name != "state.json":
                raise ValueError(f"{path} has {size >> 20} MiB; the limit for such files is {most >> 20}")


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder. Raises ValueError for a special file, or a link to outside the folder."""
    root = folder.resolve()
    # A snapshot in the hub's cache links to blobs that its revisions share.
    roots = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            continue
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(one) for one in roots):
            raise ValueError(f"{path} is a link to {target}, which is outside the folder: put the file itself there")
        if not path.is_file():
            raise ValueError(f"{path} is not a regular file (it is a pipe, a device or a broken link): remove it")
        yield path


def check_tensors(path: Path) -> None:
    """Raise ValueError if a safetensors file is truncated or its header is too large."""
    with opened(path) as file:
        start = file.read(8)
        size = os.fstat(file.fileno()).st_size
    if len(start) < 8:
        raise ValueError(f"{path} has {size} bytes, too few for a safetensors file: copy it again")
    (header,) = struct.unpack("<Q", start)
    if header > size - 8:
        raise ValueError(f"{path} is truncated or not a safetensors file: copy it again")
    if header > HEADER:
        raise ValueError(f"{path} has a header of {header >> 20} MiB; the limit is {HEADER >> 20}")


def _check_config(path: Path) -> None:
    """Check the number of layers: layers are created one by one before any weight is read."""
    waiting = [bounded_json(path, CONFIG)]
    while waiting:
        values = waiting.pop()
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, dict):
                waiting.append(value)
            elif "layer" in name and isinstance(value, int | float) and value > LAYERS:
                raise ValueError(f"{path}: {name} = {value}; the limit is {LAYERS:,}: copy it again")


def _check_index(path: Path) -> None:
    index = bounded_json(path, TEXT)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError(f"{path} has no weight_map: copy it again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{path} names {name!r:.100}, which is not a file in that folder: copy it again")
