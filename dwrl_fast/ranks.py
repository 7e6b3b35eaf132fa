"""The processes of one run, as torchrun starts them, and what they tell each other.

A rank is one of them, with a GPU of its own where there are GPUs. All ranks run the same program over the same rows;
where each does a share of the work, `gather` gives all of them the results of all.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dwrl_fast.errors import ConfigError, UserError

Value = TypeVar("Value")
FAILED = "failed"  # the rank that failed first, in the store that torchrun keeps for all


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `count`. mesh: their device mesh; None where the process was started by itself, which then
    holds the whole model.
    """

    rank: int = 0
    count: int = 1
    mesh: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that logs, renames and exports."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The `value` of every rank, in the order of ranks; on all of them."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def joined(self, own: Sequence[Value], places: Sequence[Sequence[int]]) -> list[Value]:
        """One list of what every rank has of it, on all of them. places: for each rank, where its own belong."""
        found: dict[int, Value] = {}
        for each, some in zip(places, self.gather(own), strict=True):
            found |= zip(each, some, strict=True)
        return [found[place] for place in sorted(found)]

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` gives on the first rank, on all of them; a UserError of it is raised on all."""
        if self.mesh is None:
            return make()
        said: list[Any] = [None]
        if self.first:
            try:
                said = [(make(), None)]
            except UserError as error:
                said = [(None, error)]
        dist.broadcast_object_list(said, src=0)
        value, wrong = said[0]
        if wrong is not None:
            raise wrong
        return value

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over ranks, element by element; on all of them. Any device and shape."""
        if self.mesh is not None:
            values = values.clone()
            dist.all_reduce(values)
        return values


ALONE = Ranks()


def start(timeout: float) -> Ranks:
    """Join the other processes that torchrun started, if it started this one. timeout: seconds that a rank waits for
    the others before it gives up.

    Raises ConfigError where there are more processes than GPUs, or the variables that torchrun sets are incomplete.
    """
    if "RANK" not in os.environ:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"WORLD_SIZE = {os.environ['WORLD_SIZE']} without RANK: several processes are started by torchrun, "
                "which sets both. For one process unset WORLD_SIZE."
            )
        return ALONE
    local, beside = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available():
        if beside > gpus:
            raise ConfigError(
                f"torchrun started {beside} processes on a machine with {gpus} GPUs, and each process needs one: give "
                f"--nproc-per-node {gpus}"
            )
        torch.cuda.set_device(local)
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    except (ValueError, dist.DistError) as error:
        raise ConfigError(
            f"the processes cannot find each other: {error} Start them by torchrun, which sets RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT."
        ) from None
    # torchrun may keep one store over its restarts, with the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
    global _store
    _store = store
    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (count,))
    return Ranks(rank, count, mesh)


_store: Any = None


def culprit() -> int:
    """Called by a process that fails: the rank that failed first, which alone should print its error in full."""
    own = int(os.environ.get("RANK", "0"))
    if _store is None:  # before `start`, where all ranks fail alike
        return 0
    try:
        return int(_store.compare_set(FAILED, "", str(own)))
    except RuntimeError:  # the store is gone with what started the processes
        return own


def stop() -> None:
    """Leave the other processes, at the end of the run."""
    if dist.is_initialized():
        dist.destroy_process_group()
