"""Writes checkpoints in the background: the data are copied at once, and a thread writes the copy."""

import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dwrl_fast.errors import UnwrittenError
from dwrl_fast.log import logger
from dwrl_fast.ranks import Ranks
from dwrl_fast.training.checkpoint import Place, save_checkpoint


class Saver:
    """Saves into `folder` and keeps the newest `keep` checkpoints. beside: whether training continues during a save,
    which needs memory for a copy of everything saved. With several ranks, training waits.

    A failed write does not end the run: it is logged, and earlier checkpoints are unchanged. As a context manager it
    waits for the current write, unless a signal ends the run.
    """

    def __init__(self, folder: Path, keep: int | None, ranks: Ranks, *, beside: bool):
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self.beside = beside and ranks.mesh is None
        self.copies: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.place: Place | None = None  # of the last save
        self.failure: Exception | None = None  # of the last save

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.finish()

    def save(
        self, place: Place, tensors: dict[str, Tensor], state: dict[str, Any], spared: Collection[str] = ()
    ) -> None:
        """Save a checkpoint for `place`, unless the last save had the same place. spared: names of older checkpoints to
        keep. Waits for the previous save.
        """
        if self.finish() and place == self.place:
            return
        self.place, self.failure = place, None
        if not self.beside:
            self._write(place, tensors, state, spared)
            self.finish()
            return
        self._copy(tensors)
        self.thread = threading.Thread(
            target=self._write, args=(place, self.copies, state, spared), name="checkpoint", daemon=True
        )
        self.thread.start()

    def finish(self) -> bool:
        """Wait for the current write. Returns whether the last save is on disk. Logs a refusal of the disk, and raises
        any other error.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failure, self.place = self.failure, self.place if self.failure is None else None
        self.failure = None
        if isinstance(failure, UnwrittenError):
            logger.error("%s The run continues without it; the next checkpoint is tried when it is due.", failure)
        elif failure is not None:
            raise failure
        return self.place is not None

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """Copy into CPU memory that is reused for all saves."""
        for name, tensor in tensors.items():
            copy = self.copies.get(name)
            if copy is None:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _write(self, place: Place, tensors: dict[str, Tensor], state: dict[str, Any], spared: Collection[str]) -> None:
        step, update = place
        try:
            save_checkpoint(
                self.folder, step, tensors, state, self.keep, update=update, spared=spared, ranks=self.ranks
            )
        except Exception as error:  # raised when the thread is joined
            self.failure = error
