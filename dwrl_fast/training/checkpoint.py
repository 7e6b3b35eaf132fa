"""Checkpoints: one folder each, written atomically, restored bit for bit.

    parent/checkpoint-000120/   shard-00001-model-00001-of-00001.safetensors   the tensors, or one rank's shards
                                state.json                                     everything else
                                manifest.json             size and SHA-256 of each file, written last

A checkpoint within a step is named checkpoint-000120-0007: 120 steps are finished, and seven updates of the next one. A
checkpoint is written under a temporary name, synced to disk, and renamed, so that a process killed at any moment leaves
earlier checkpoints unchanged. A saved checkpoint is never overwritten. Only one run at a time writes to a parent folder
(lock.py).

torch.distributed.checkpoint writes and reads the tensors, each rank its own shards, so any number of ranks can resume
from a checkpoint. Loading trusts no file: files that the manifest does not list are not read, and no file is a pickle.
"""

import itertools
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from dwrl_fast.errors import CheckpointError, UnwrittenError, UserError
from dwrl_fast.files import bounded_json, check_folder, check_size
from dwrl_fast.log import logger
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.training.manifest import FORMAT, MANIFEST, STATE, UNREADABLE, fingerprint, verify

FILE_BYTES = 2**30  # a file holds the tensors that begin within this many bytes
MOST_STATE = 1 << 30  # bytes; a thought of 500 tokens takes about 15 KB
UNFINISHED = ".unfinished"
DAMAGED = ".damaged"
NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?")

Place = tuple[int, int]  # finished steps, and updates of the next step


def save_checkpoint(
    parent: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int | None = None,
    *,
    update: int = 0,
    spared: Collection[str] = (),
    ranks: Ranks = ALONE,
) -> Path:
    """Write `parent/checkpoint-STEP`, or `-STEP-UPDATE`, and return its path. Then remove all but the newest `keep`
    checkpoints; this one and those named in `spared` are never removed.

    tensors: any dtypes and shapes, by name. state: values that JSON restores unchanged (no tuples, all keys text, no
    NaN); that of the first rank is written. All `ranks` call this together with one folder that all of them can access;
    each writes its shards. Raises UnwrittenError if the disk refuses a write or the state is too large (earlier
    checkpoints stay intact), and CheckpointError if the checkpoint exists already or an argument is not valid.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep = {keep}: at least the checkpoint just written is kept")
    final = parent / name_of((step, update))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}: only tensors are saved here; other values belong to the state."
            )
    folder = final.with_name(final.name + UNFINISHED)
    text = ""  # only on the first rank, because it may be large

    def begin() -> None:
        nonlocal text
        text = _state_text(state)
        _make(folder, final)

    try:
        ranks.from_first(begin)
        with _writing(final):
            files = _write_tensors(folder, tensors, ranks)
        ranks.from_first(lambda: _complete(folder, final, text, files))
    except (UnwrittenError, KeyboardInterrupt):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if keep is not None:
        ranks.from_first(lambda: _prune(final, keep, spared))
    return final


def latest_checkpoint(parent: Path) -> Path | None:
    """The newest intact checkpoint under `parent`, or None. Skipped ones are logged with the reason."""
    for folder in sorted(parent.glob(f"*{UNFINISHED}")):
        logger.warning("Ignored %s, left by an interrupted save or removal.", folder)
    for folder in reversed(checkpoints(parent)):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("SKIPPED: %s", error)
            continue
        return folder
    return None


def checkpoints(parent: Path, past: Place = (-1, 0)) -> list[Path]:
    """The folders with a checkpoint name and a place after `past`, oldest first."""
    found = [(place, folder) for folder in parent.glob("checkpoint-*") if (place := place_of(folder)) is not None]
    return [folder for place, folder in sorted(found) if place > past]


def name_of(place: Place) -> str:
    """The folder name of a checkpoint."""
    step, update = place
    return f"checkpoint-{step:06d}" + (f"-{update:04d}" if update else "")


def place_of(folder: Path) -> Place | None:
    """The place of a checkpoint, from its folder name; None if it is not a checkpoint name."""
    found = NAME.fullmatch(folder.name)
    return None if found is None else (int(found[1]), int(found[2] or 0))


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to a name that is not a checkpoint name, so that its step can be saved again. Returns
    the new path.
    """
    ends = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    names = (folder.with_name(folder.name + DAMAGED + end) for end in ends)
    return folder.rename(next(name for name in names if not name.exists()))


def load_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    accept: Callable[[dict[str, Any]], object] = lambda state: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint at `path` and return its state. All `ranks` call this together. Their
    number may differ from that of the ranks that wrote it.

    accept: called with the state before any tensor is filled; raises if the run must not resume from this checkpoint.
    Raises CheckpointError if the checkpoint is missing, incomplete or altered, or holds different names, shapes or
    dtypes.
    """
    ranks.from_first(lambda: verify(path))
    try:
        state = read_state(path)
        accept(state)
        check_folder(path)
        reader = dcp.HuggingFaceStorageReader(str(path))
        _match(path, reader.read_metadata(), tensors)
        with _quiet():
            dcp.load(
                dict(tensors),
                storage_reader=reader,
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=ranks.mesh is None,
            )
        return state
    except UserError:
        raise
    except (*UNREADABLE, TypeError, LookupError, CheckpointException, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {_cause(error)}. Use another checkpoint.") from error


def read_state(path: Path) -> dict[str, Any]:
    """The state of the checkpoint at `path`, which is not verified. Raises CheckpointError if it cannot be read."""
    try:
        state = bounded_json(path / STATE, MOST_STATE)
        if not isinstance(state, dict):
            raise TypeError(f"{STATE} holds a {type(state).__name__}")
        return state
    except (*UNREADABLE, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {_cause(error)}. Use another checkpoint.") from error


# Writing


def _state_text(state: dict[str, Any]) -> str:
    """The state as JSON. Raises CheckpointError if it cannot be restored from JSON, and UnwrittenError if it is larger
    than a state that is read.
    """
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The state cannot be written as JSON: {error}.") from None
    try:
        check_size(text, MOST_STATE)
    except ValueError as error:
        raise UnwrittenError(
            f"No checkpoint was written: the rollout batch with its thoughts is {error}. Make it smaller with "
            "--rollout_batch_size, --num_generations or --max_completion_length. Earlier checkpoints are unchanged."
        ) from None
    if json.loads(text) != state:
        raise CheckpointError(
            "The state would change when it is read back from JSON: it holds tuples, or keys that are not text."
        )
    return text


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    """A context that turns errors of the disk into UnwrittenError."""
    try:
        yield
    except (OSError, CheckpointException, SafetensorError) as error:
        raise UnwrittenError(
            f"{final} could not be written: {_cause(error)}. Earlier checkpoints are unchanged."
        ) from error


def _write_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """Write and sync this rank's shards. Returns the fingerprints of the files of all ranks. If the disk of one rank
    refuses, all ranks raise.
    """
    with _quiet():
        dcp.save(
            tensors,
            storage_writer=dcp.HuggingFaceStorageWriter(str(folder), _file_of(tensors), save_distributed=True),
            planner=_Planner(flatten_state_dict=False),
            no_dist=ranks.mesh is None,
        )
    own: dict[str, Any] = {}
    failure: OSError | None = None
    try:
        for path in sorted(folder.glob(f"shard-{ranks.rank + 1:05d}-*")):
            _sync(path)
            own[path.name] = fingerprint(path)
    except OSError as error:
        failure = error
    parts = ranks.gather((own, failure))
    if failures := [failure for _, failure in parts if failure is not None]:
        raise failures[0]
    return {name: each for part, _ in parts for name, each in part.items()}


def _write_rest(folder: Path, state: str, files: dict[str, Any]) -> None:
    """Write the state and, last, the manifest."""
    (folder / STATE).write_text(state, encoding="utf-8")
    _sync(folder / STATE)
    manifest = {"format": FORMAT, "files": dict(sorted((files | {STATE: fingerprint(folder / STATE)}).items()))}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


class _Planner(dcp.DefaultSavePlanner):
    """Passes one tensor at a time, in the order in which safetensors writes them."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object.contiguous()


def _file_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The file number of each tensor. One file's tensors are copied in memory while they are written."""
    sizes = itertools.accumulate((tensor.numel() * tensor.itemsize for tensor in tensors.values()), initial=0)
    return {name: 1 + size // FILE_BYTES for name, size in zip(tensors, sizes, strict=False)}


def _sync(path: Path) -> None:
    """Sync a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(newest: Path, keep: int, spared: Collection[str]) -> None:
    """Remove the oldest checkpoints except `newest`, after `newest` is complete on disk."""
    old = [folder for folder in checkpoints(newest.parent) if folder != newest and folder.name not in spared]
    surplus = old[: max(0, len(old) - (keep - 1))]
    if surplus:
        verify(newest)
    for folder in surplus:
        # Renamed first: if the process is killed half-way, the rest must not look like a damaged checkpoint.
        try:
            shutil.rmtree(folder.rename(folder.with_name(folder.name + UNFINISHED)))
        except OSError as error:
            logger.warning("%s is no longer needed, but could not be removed: %s.", folder, error)


def _make(folder: Path, final: Path) -> None:
    """Create the empty folder for writing a checkpoint, and remove those that interrupted saves left."""
    if final.exists():
        raise CheckpointError(
            f"{final} exists, and a saved step is never overwritten. Give another --output_dir, or move it away."
        )
    with _writing(final):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in sorted(folder.parent.glob(f"checkpoint-*{UNFINISHED}")):
            logger.warning("Removing %s, left by an interrupted save or removal.", left)
            shutil.rmtree(left)


def _complete(folder: Path, final: Path, state: str, files: dict[str, Any]) -> None:
    """Complete the checkpoint in `folder`, which holds the tensors, and rename it."""
    with _writing(final):
        _write_rest(folder, state, files)
        folder.rename(final)
        _sync(final.parent)


# Reading


def _match(path: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly these tensors, complete."""
    remedy = "It belongs to a run with other options: resume with the configuration saved next to it."
    stored: dict[str, Any] = metadata.state_dict_metadata
    missing, surplus = tensors.keys() - stored.keys(), stored.keys() - tensors.keys()
    if missing or surplus:
        what = [f"lacks {_listed(missing)}"] * bool(missing) + [f"also holds {_listed(surplus)}"] * bool(surplus)
        raise CheckpointError(f"{path} {' and '.join(what)}. {remedy}")
    for name, tensor in tensors.items():
        there, here = (stored[name].size, stored[name].properties.dtype), (tensor.size(), tensor.dtype)
        if there != here:
            there_text, here_text = (f"{dtype} {list(size)}" for size, dtype in (there, here))
            raise CheckpointError(
                f"{path}: {name} is {there_text} in the checkpoint and {here_text} in this run. {remedy}"
            )
        if not _tiled(stored[name].chunks, tensor.size()):
            raise CheckpointError(
                f"{path}: the parts of {name} do not add up to the whole tensor. Use another checkpoint."
            )
    for index, place in metadata.storage_data.items():
        if place.dtype != tensors[index.fqn].dtype:
            raise CheckpointError(f"{path}: a part of {index.fqn} is {place.dtype}. Use another checkpoint.")


def _tiled(parts: list[ChunkStorageMetadata], size: tuple[int, ...]) -> bool:
    """Whether parts within `size` cover every element exactly once."""
    if any(len(part.offsets) != len(size) or min(part.offsets, default=0) < 0 for part in parts):
        return False
    boxes = [list(zip(part.offsets, part.sizes, strict=True)) for part in parts if math.prod(part.sizes)]
    apart = all(
        any(a + m <= b or b + n <= a for (a, m), (b, n) in zip(one, other, strict=True))
        for one, other in itertools.combinations(boxes, 2)
    )
    return apart and sum(math.prod(part.sizes) for part in parts) == math.prod(size)


def _listed(names: Iterable[str]) -> str:
    first, rest = sorted(names)[:3], max(0, len(list(names)) - 3)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def _cause(error: BaseException) -> str:
    """The cause of an error, in words. torch.distributed.checkpoint wraps all exceptions by rank, even an interrupt,
    which is raised again here.
    """
    if not isinstance(error, CheckpointException):
        return str(error)
    failures = [failure for failure, _ in error.failures.values()]
    for failure in failures:
        if not isinstance(failure, Exception):
            raise failure
    return "; ".join(f"{type(failure).__name__}: {failure}" for failure in failures)


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the library's warning that torch.distributed is not initialised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
