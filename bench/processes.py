"""Runs a function in several processes, started like by torchrun, and collects the results."""

import multiprocessing
import os
import pickle
import random
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dwrl_fast import ranks


def free_port() -> int:
    """A port that is free, from below those that the system gives to other programs before it is used."""
    for port in random.SystemRandom().sample(range(10_000, 32_768), 100):
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports from 10000 to 32767 are in use")


def together(folder: Path, count: int, function: Callable[..., Any], *args: Any, seconds: float = 300) -> list[Any]:
    """The results of `function(ranks, *args)` on each of `count` ranks. folder: for results. seconds: time limit."""
    port = free_port()
    context = multiprocessing.get_context("spawn")
    files = [folder / f"rank-{rank}-of-{count}.pkl" for rank in range(count)]
    made = [
        context.Process(target=_run, args=(rank, count, port, files[rank], function, args)) for rank in range(count)
    ]
    for process in made:
        process.start()
    for process in made:
        process.join(seconds)
    alive = [process for process in made if process.is_alive()]
    for process in alive:
        process.kill()
    found = [pickle.loads(file.read_bytes()) if file.exists() else (None, "it returned nothing") for file in files]
    errors = [error for _, error in found if error]
    assert not errors and not alive, "\n\n".join(errors) or "the processes did not end"
    return [value for value, _ in found]


def _run(rank: int, count: int, port: int, file: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        value, error = function(ranks.start(600), *args), ""
    except BaseException:
        value, error = None, f"rank {rank}: {traceback.format_exc()}"
    part = file.with_suffix(".part")
    part.write_bytes(pickle.dumps((value, error)))
    part.rename(file)
    if error:
        os._exit(1)
    ranks.stop()
