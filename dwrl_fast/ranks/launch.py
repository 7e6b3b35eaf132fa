"""Joining and leaving the processes that torchrun started, and finding the one that failed first."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dwrl_fast.errors import ConfigError
from dwrl_fast.ranks.ranks import ALONE, Ranks

FAILED = "failed"  # key of the rank that failed first, in torchrun's shared store
_store: Any = None


def start(timeout: float, *, hsdp: bool = False) -> Ranks:
    """Join the other processes that torchrun started, if it started this one. timeout: seconds that a rank waits for
    the others before it gives up. hsdp: each machine holds a whole model, and each of its ranks a part of it.

    Raises ConfigError if there are more processes than GPUs, if torchrun's variables are incomplete, or if `hsdp` is
    set on one machine.
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
    # torchrun may keep one store over restarts, with addresses of processes that no longer exist.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    global _store
    _store = store
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Ranks(rank, count, mesh_of(device, count, beside if hsdp else None))


def mesh_of(device: str, count: int, beside: int | None = None) -> Any:
    """The device mesh over `count` ranks: one dimension, over which a model is sharded. beside: the ranks per machine;
    if given, a mesh of two dimensions, in which the ranks of each machine hold all shards. Raises ConfigError unless
    there are several machines with equally many ranks.
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
    """Called by a failing process: the rank that failed first. Only that rank should print its full error."""
    own = int(os.environ.get("RANK", "0"))
    if _store is None:  # before the ranks are connected, all fail in the same way
        return own - int(os.environ.get("LOCAL_RANK", "0"))
    try:
        return int(_store.compare_set(FAILED, "", str(own)))
    except RuntimeError:  # the store ended together with the launcher
        return own


def stop() -> None:
    """Leave the process group at the end of the run."""
    if dist.is_initialized():
        dist.destroy_process_group()
