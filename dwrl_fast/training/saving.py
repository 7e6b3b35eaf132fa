"""A run's checkpoints, written beside training: what is to be saved is copied at once, and a thread writes the copy."""

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
    """Saves into `folder`, of which the newest `keep` are kept. beside: training goes on meanwhile, for the memory of a
    copy of all that is saved; several ranks write together, and training waits for them.

    A disk that refuses does not end the run: that is said, and the checkpoints before it stay as they are. As a context
    it waits for what is being written, unless a signal ends the run.
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
        """Save what a run holds at `place`, unless it is the place of the last save. spared: names of older checkpoints
        that are kept. Waits for the save before.
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
        """Wait for what is being written; whether the last save is on the disk. Says where the disk refused it, and
        raises any other error.
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
        """Into memory that is kept from save to save, on the processor."""
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
        except Exception as error:  # raised where the thread is waited for
            self.failure = error
