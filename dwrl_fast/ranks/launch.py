"""How a process joins the others that torchrun started, leaves them, and says which of them failed."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dwrl_fast.errors import ConfigError
from dwrl_fast.ranks.ranks import ALONE, Ranks

FAILED = "failed"  # the rank that failed first, in the store that torchrun keeps for all
_store: Any = None


def start(timeout: float, *, hsdp: bool = False) -> Ranks:
    """Join the other processes that torchrun started, if it started this one. timeout: seconds that a rank waits for
    the others before it gives up. hsdp: each machine holds a whole model, its ranks a part each.

    Raises ConfigError if there are more processes than GPUs, the variables that torchrun sets are incomplete, or
    `hsdp` is asked for on one machine.
    """
    if "RANK" not in os.environ:
        if os.environ.get("WORLD_SIZE") not in (None, "", "1"):
            raise ConfigError(
                f"WORLD_SIZE = {os.environ['WORLD_SIZE']} without RANK: start several processes with torchrun, which "
                "sets both. For one process unset WORLD_SIZE."
            )
        return ALONE
    local, beside = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available():
        if beside > gpus:
            raise ConfigError(
                f"torchrun started {beside} processes on a machine with {gpus} GPUs, but each process needs one: give "
                f"--nproc-per-node {gpus}"
            )
        torch.cuda.set_device(local)
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    except (ValueError, dist.DistError) as error:
        raise ConfigError(
            f"the processes cannot find each other: {error} Start them with torchrun, which sets RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT."
        ) from None
    # torchrun may keep one store over its restarts, with the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    global _store
    _store = store
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Ranks(rank, count, mesh_of(device, count, beside if hsdp else None))


def mesh_of(device: str, count: int, beside: int | None = None) -> Any:
    """The mesh over `count` ranks: one line, along which a model lies in parts; with `beside`, the ranks of a machine,
    a line a machine, each with all parts. Raises ConfigError if there are not several machines with as many ranks each.
    """
    if beside is None:
        return dist.init_device_mesh(device, (count,))
    if count == beside or count % beside:
        raise ConfigError(
            f"--hsdp: {count} processes, {beside} of them on this machine. It needs several machines with equally "
            "many processes (torchrun --nnodes 2 or more, the same --nproc-per-node on all): leave it out on one "
            "machine."
        )
    return dist.init_device_mesh(device, (count // beside, beside), mesh_dim_names=("machine", "part"))


def culprit() -> int:
    """Called by a process that fails: the rank that failed first, which alone should print its error in full."""
    own = int(os.environ.get("RANK", "0"))
    if _store is None:  # before the ranks have met: those of a machine fail alike
        return own - int(os.environ.get("LOCAL_RANK", "0"))
    try:
        return int(_store.compare_set(FAILED, "", str(own)))
    except RuntimeError:  # the store is gone with what started the processes
        return own


def stop() -> None:
    """Leave the other processes, at the end of the run."""
    if dist.is_initialized():
        dist.destroy_process_group()
