"""The manifest of a checkpoint. It shows that a folder is complete, unchanged, and holds no other tensor files."""

import hashlib
import os
from pathlib import Path
from typing import Any

from dwrl_fast.errors import CheckpointError
from dwrl_fast.files import bounded_json, opened

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 2  # format 1 contained a pickle
UNREADABLE = (OSError, ValueError, RecursionError)  # errors of reading JSON


def fingerprint(path: Path) -> dict[str, Any]:
    """The manifest entry of a file. Raises OSError if the file cannot be read."""
    with opened(path) as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def verify(path: Path) -> None:
    """Raise CheckpointError unless all files of the manifest exist unchanged and there are no other tensor files."""
    try:
        manifest = bounded_json(path / MANIFEST)
    except FileNotFoundError:
        what = f"has no {MANIFEST}: it is not a checkpoint, or is incomplete" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}.") from None
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error}).") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if isinstance(files, dict) and manifest.get("format") == 1:
        raise CheckpointError(
            f"{path} was written by dwrl_fast 0.1, in a format with a pickle, which this version does not read: "
            "continue with that version, or start a new run in another --output_dir."
        )
    if not isinstance(files, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: {MANIFEST} is not of format {FORMAT}, the one this version writes.")
    there = {file.name for file in path.glob("*.safetensors")}
    for name in sorted({STATE, *there, *files}):
        if not name.isprintable():
            raise CheckpointError(f"{path}: {MANIFEST} names {name!a}, which is not the name of a checkpoint file.")
        if name not in files or Path(name).name != name:
            raise CheckpointError(f"{path}: {MANIFEST} does not list {name}.")
        try:
            intact = fingerprint(path / name) == files[name]
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror}).") from None
        if not intact:
            raise CheckpointError(f"{path}: {name} has changed since it was written; the checkpoint is damaged.")
