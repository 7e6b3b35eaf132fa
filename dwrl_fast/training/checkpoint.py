"""Checkpoints: one folder a step, whole or absent, given back to the bit.

    parent/checkpoint-000120/   __0_0.distcp, .metadata   the tensors, by torch.distributed.checkpoint
                                state.json                everything else
                                manifest.json             size and SHA-256 of each file, written last

A save is written beside its final place, made durable, and renamed into it, so that a process killed at any moment
leaves the earlier checkpoints as they were. A step once saved is never written again. One process writes to a parent
folder at a time (lock.py).

Loading trusts no file: what the manifest does not vouch for is not read, tensors are read with `weights_only`, and
`.metadata`, which is a pickle, by an unpickler that knows the few classes it is made of and refuses everything else.
"""

import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo

from dwrl_fast.errors import CheckpointError
from dwrl_fast.log import logger

MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"
FORMAT = 1
UNFINISHED = ".unfinished"
DAMAGED = ".damaged"


def save_checkpoint(
    parent: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int | None = None
) -> Path:
    """Write `parent/checkpoint-STEP` and return it; then remove all but the newest `keep` (this one is never removed).

    tensors: any dtypes and shapes, by name. state: what JSON gives back unchanged (no tuples, all keys text, no NaN).
    CheckpointError: the step exists, something is not as said above, or the disk fails; earlier checkpoints stay whole.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep = {keep}: at least the checkpoint just written is kept")
    final = parent / f"checkpoint-{step:06d}"
    if final.exists():
        raise CheckpointError(
            f"{final} exists, and a saved step is never overwritten. Give another --output_dir, or move it away."
        )
    text = _state_text(state)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}: only tensors are saved here, the rest is state."
            )
    parent.mkdir(parents=True, exist_ok=True)
    _clear(parent)
    folder = final.with_name(final.name + UNFINISHED)
    try:
        _write(folder, tensors, text)
        folder.rename(final)
        _sync(parent)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written: {_cause(error)}. Earlier checkpoints are as they were."
        ) from error
    if keep is not None:
        _prune(final, keep)
    return final


def latest_checkpoint(parent: Path) -> Path | None:
    """The newest checkpoint under `parent` that is whole, or None. Those passed over are said, with what is wrong."""
    for folder in sorted(parent.glob(f"*{UNFINISHED}")):
        logger.warning("Passed over %s, left by an interrupted save or removal.", folder)
    for folder in reversed(checkpoints(parent)):
        try:
            _verify(folder)
        except CheckpointError as error:
            logger.warning("PASSED OVER: %s", error)
            continue
        return folder
    return None


def checkpoints(parent: Path, past: int = -1) -> list[Path]:
    """The folders that have the name of a checkpoint, of a step past `past`; oldest first."""
    found = [(int(m[1]), f) for f in parent.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", f.name))]
    return [folder for step, folder in sorted(found) if step > past]


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to a name that is no checkpoint's, so that its step can be saved again; where it is
    then.
    """
    ends = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    names = (folder.with_name(folder.name + DAMAGED + end) for end in ends)
    return folder.rename(next(name for name in names if not name.exists()))


def load_checkpoint(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint at `path` and return its state.

    CheckpointError: it is missing, incomplete or altered, would run code, or holds other names, shapes or dtypes.
    """
    files = _verify(path)
    metadata = _read_metadata(path, files)
    _match(path, metadata.state_dict_metadata, tensors)
    try:
        with _one_process():
            dcp.load(
                dict(tensors),
                storage_reader=_Reader(path, metadata),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=True,
            )
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be read: {_cause(error)}. Use another checkpoint.") from error


# Writing


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: by default it would put the temporary folder's path into the checkpoint."""


def _state_text(state: dict[str, Any]) -> str:
    try:
        text = json.dumps(state, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The state cannot be written as JSON: {error}.") from None
    if json.loads(text) != state:
        raise CheckpointError(
            "The state would not come back from JSON as it is: it holds tuples, or keys that are not text."
        )
    return text


def _write(folder: Path, tensors: dict[str, Tensor], state: str) -> None:
    with _one_process():
        dcp.save(
            tensors,
            storage_writer=_Writer(folder, sync_files=False),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    (folder / STATE).write_text(state, encoding="utf-8")
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        _sync(folder / name)
    files = {name: _fingerprint(folder / name) for name in names}
    manifest = {"format": FORMAT, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _prune(newest: Path, keep: int) -> None:
    """Remove the oldest beside `newest`, once `newest` is known to be whole on the disk."""
    old = [folder for folder in checkpoints(newest.parent) if folder != newest]
    surplus = old[: max(0, len(old) - (keep - 1))]
    if surplus:
        _verify(newest)
    for folder in surplus:
        # Renamed first: killed half-way, what is left must not look like a checkpoint that went bad.
        shutil.rmtree(folder.rename(folder.with_name(folder.name + UNFINISHED)))


def _clear(parent: Path) -> None:
    for folder in sorted(parent.glob(f"checkpoint-*{UNFINISHED}")):
        logger.warning("Removing %s, left by an interrupted save or removal.", folder)
        shutil.rmtree(folder)


# Reading


def _verify(path: Path) -> dict[str, Any]:
    """The files of the manifest, each of which is there as it was written; CheckpointError otherwise."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"has no {MANIFEST}: it is not a checkpoint, or is incomplete" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error}).") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise CheckpointError(f"{path}: {MANIFEST} is not of format {FORMAT}, the one this version writes.")
    files = manifest["files"]
    for name in sorted({STATE, METADATA, *files}):
        if name not in files or Path(name).name != name:
            raise CheckpointError(f"{path}: {MANIFEST} does not vouch for {name}.")
        try:
            intact = _fingerprint(path / name) == files[name]
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror}).") from None
        if not intact:
            raise CheckpointError(f"{path}: {name} is not as it was written; the checkpoint is damaged.")
    return files


_CLASSES = (
    dcp_metadata.Metadata,
    dcp_metadata.MetadataIndex,
    dcp_metadata.TensorStorageMetadata,
    dcp_metadata.ChunkStorageMetadata,
    dcp_metadata.TensorProperties,
    dcp_metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
)
_ADMITTED: dict[tuple[str, str], Any] = {(cls.__module__, cls.__qualname__): cls for cls in _CLASSES}
_ADMITTED["torch", "Size"] = torch.Size
_ADMITTED["torch.serialization", "_get_layout"] = (
    torch.serialization._get_layout
)  # a look-up of torch.strided and its like


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which the metadata of tensors does not need")
        return _ADMITTED[module, name]


class _Reader(dcp.FileSystemReader):
    """Reads tensors by metadata that has been checked, where the base class would unpickle it unchecked."""

    def __init__(self, path: Path, metadata: dcp_metadata.Metadata) -> None:
        super().__init__(path)
        self.checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        return self.checked


def _read_metadata(path: Path, files: dict[str, Any]) -> dcp_metadata.Metadata:
    """`.metadata`, holding tensors alone, all of them in files that the manifest vouches for."""
    try:
        with open(path / METADATA, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        tensors, places = metadata.state_dict_metadata, metadata.storage_data
        plain = all(type(entry) is dcp_metadata.TensorStorageMetadata for entry in tensors.values())
        inside = all(place.relative_path in files and not place.transform_descriptors for place in places.values())
    except Exception as error:  # a crafted pickle may raise anything
        raise CheckpointError(f"{path}: {METADATA} is refused: {error}. Do not use this checkpoint.") from None
    if not (plain and inside):
        raise CheckpointError(
            f"{path}: {METADATA} is refused: it holds more than tensors, or points outside the checkpoint."
        )
    return metadata


def _match(path: Path, stored: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    remedy = "It belongs to a run with other options: resume with the configuration saved beside it."
    missing, surplus = tensors.keys() - stored.keys(), stored.keys() - tensors.keys()
    if missing or surplus:
        what = [f"lacks {_listed(missing)}"] * bool(missing) + [f"holds {_listed(surplus)} besides"] * bool(surplus)
        raise CheckpointError(f"{path} {' and '.join(what)}. {remedy}")
    for name, tensor in tensors.items():
        there, here = (stored[name].size, stored[name].properties.dtype), (tensor.size(), tensor.dtype)
        if there != here:
            there_text, here_text = (f"{dtype} {list(size)}" for size, dtype in (there, here))
            raise CheckpointError(f"{path}: {name} is {there_text} there and {here_text} here. {remedy}")


def _listed(names: Iterable[str]) -> str:
    first, rest = sorted(names)[:3], max(0, len(list(names)) - 3)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def _cause(error: BaseException) -> str:
    """What went wrong. torch.distributed.checkpoint wraps everything by rank, even an interrupt: that is raised."""
    if not isinstance(error, CheckpointException):
        return str(error)
    failures = [failure for failure, _ in error.failures.values()]
    for failure in failures:
        if not isinstance(failure, Exception):
            raise failure
    return "; ".join(f"{type(failure).__name__}: {failure}" for failure in failures)


@contextmanager
def _one_process() -> Iterator[None]:
    """Without the library's remark that torch.distributed is not initialised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
