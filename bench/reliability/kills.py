"""Tests that a SIGKILL at any point of a save leaves the newest intact checkpoint usable.

Processes save in an endless loop, next to simulated training, and are killed before each file operation of a save, with
half of a file written, and at random moments. Then the same with two processes that save together, of which one is
killed.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from bench.processes import free_port
from bench.reliability.drill import Drill
from bench.reliability.lives import Boundaries, die, ended, life, lived
from dwrl_fast import ranks
from dwrl_fast.errors import CheckpointError
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dwrl_fast.training.saving import Saver

SIZE = 200_000  # numbers in a tensor; writing takes a few milliseconds
UPDATES = 4  # saves within a step, such as checkpoint-000001-0003
FIRST = 4  # first save of a drill


class Said(NamedTuple):
    """The reports of a process before it ended: the last save that it started, and the last one that it completed."""

    begun: int
    whole: int


def numbers(save: int) -> dict[str, Tensor]:
    """The tensors of save number `save`."""
    return {"a": torch.arange(save, save + SIZE), "b": torch.full((1000,), save / 3), "scalar": torch.tensor(save)}


def save_without_end(folder: Path, first: int, say: int, boundary: tuple[int, Callable[[], object]] | None) -> None:
    """Write saves `first`, `first` + 1, ..., and report them to the descriptor `say`. boundary: the file operation to
    strike at, counted from the third save on, the first one that also removes an older checkpoint.
    """
    torch.set_num_threads(1)
    saver = Saver(folder, 2, ALONE, beside=True)
    watched = None if boundary is None else Boundaries(folder, *boundary)
    for save in range(first, first + 10_000):
        if watched is not None and save == first + 2:
            saver.finish()
            watched.armed = True
        saver.save(divmod(save, UPDATES), numbers(save), {"save": save})
        os.write(say, f"begun {save}\n".encode())
        assert saver.finish()
        os.write(say, f"whole {save}\n".encode())
        if watched is not None and save == first + 2:
            os.write(say, f"count {watched.count}\n".encode())
            return


def half_written() -> None:
    """Kill this process with half of the next small file written."""
    write = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
            file.flush()
        die()
        return write(self, text, **options)

    setattr(Path, "write_text", half)  # noqa: B010 - mypy takes no assignment to a method


def told(lines: list[str], what: str, before: int) -> int:
    """The last reported number for `what`."""
    return max((int(line.split()[1]) for line in lines if line.startswith(what)), default=before)


def heard(hear: int, saves: int | None = None) -> bytes:
    """The reports of processes until they have completed `saves` saves; None: until they have ended."""
    text = b""
    while (saves is None or text.count(b"whole") < saves) and (more := os.read(hear, 4096)):
        text += more
    return text


def killed_once(folder: Path, first: int, moment: tuple[int, float] | None, **how: Any) -> tuple[Said, int, int]:
    """Run one process. moment: the number of saves and the seconds after them at which it is killed; None: it ends by
    itself. Returns its reports, its status, and its count of operations.
    """
    hear, say = os.pipe()
    process = life(lambda: save_without_end(folder, first, say, **how), folder.with_suffix(".log"))
    os.close(say)
    text = b""
    if moment is not None:
        text = heard(hear, moment[0])
        time.sleep(moment[1])
        os.kill(process, signal.SIGKILL)
    status = ended(process)
    text += heard(hear)
    os.close(hear)
    lines = [line for line in text.decode().split("\n") if line.count(" ") == 1]
    return Said(told(lines, "begun", first - 1), told(lines, "whole", first - 1)), status, told(lines, "count", 0)


def intact(folder: Path, said: Said) -> str:
    """What is wrong with the newest checkpoint after a process with these reports; empty if nothing is."""
    path = latest_checkpoint(folder)
    if path is None:
        return "" if said.whole < FIRST else f"none of {said.whole} saves is left"
    into = {name: torch.full_like(tensor, 7) for name, tensor in numbers(0).items()}
    try:
        save = load_checkpoint(path, into)["save"]
    except CheckpointError as error:
        return str(error)
    if any(not torch.equal(tensor, numbers(save)[name]) for name, tensor in into.items()):
        return f"{path.name} does not hold what was saved"
    if not said.whole <= save <= said.begun + 1:
        return f"save {said.whole} was complete, {said.begun} started, but {save} is the newest"
    return ""


def single(folder: Path, kills: int, seed: int = 0) -> Drill:
    """SIGKILLs of one process: before every file operation of a save, with half of a file written, and the rest at
    random.
    """
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    _, status, count = killed_once(folder / "counted", FIRST, None, boundary=(0, die))
    assert status == 0 and count > 10, (status, count)
    wrong, done, lost = [], 0, 0

    def judge(place: Path, result: tuple[Said, int, int], where: str) -> None:
        nonlocal done, lost
        said, status, _ = result
        if status != -signal.SIGKILL:
            wrong.append(f"{where}: the kill did not occur, status {status}")
            return
        done += 1
        found = intact(place, said)
        newest = latest_checkpoint(place)
        lost = max(lost, said.begun - _save_of(newest))
        if found:
            wrong.append(f"{where}: {found}")

    for number in range(1, count + 1):
        place = folder / f"boundary-{number}"
        judge(place, killed_once(place, FIRST, None, boundary=(number, die)), f"operation {number}")
    place = folder / "half"
    judge(place, killed_once(place, FIRST, None, boundary=(1, half_written)), "half a file")
    place, first, within = folder / "random", FIRST, 0
    while done + len(wrong) < kills:
        moment = chance.randint(0, 2), chance.uniform(0.0, 0.04)
        result = killed_once(place, first, moment, boundary=None)
        within += result[0].begun > result[0].whole
        judge(place, result, f"at random, save {result[0].begun}")
        first = _save_of(latest_checkpoint(place)) + 1
    found = f"{done - len(wrong)} of {done} load, {count} operations of a save, {within} at random within one, "
    found += f"at most {max(0, lost)} saves lost"
    name = "SIGKILL while one process saves"
    return Drill(
        name, f"{kills} of {kills} load, at most one lost", found + "; ".join(wrong[:3]), not wrong and lost <= 1
    )


def _save_of(path: Path | None) -> int:
    if path is None:
        return FIRST - 1
    step, _, update = path.name.removeprefix("checkpoint-").partition("-")
    return int(step) * UPDATES + int(update or 0)


# Two processes


def save_together(folder: Path, rank: int, port: int, first: int, say: int) -> None:
    """One of two processes that save sharded tensors without end."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both: Ranks = ranks.start(30)
    for save in range(first, first + 10_000):
        tensors = {k: distribute_tensor(v, both.mesh, [Shard(0)]) if v.dim() else v for k, v in numbers(save).items()}
        os.write(say, f"begun {save}\n".encode())
        save_checkpoint(folder, save // UPDATES, tensors, {"save": save}, 2, update=save % UPDATES, ranks=both)
        os.write(say, f"whole {save}\n".encode())


def together(folder: Path, kills: int, seed: int = 0) -> Drill:
    """SIGKILLs of one of two processes that save together."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    place, first, wrong, lost, during = folder / "run", FIRST, list[str](), 0, 0
    for number in range(kills):
        port = free_port()
        hear, say = os.pipe()
        pair = [
            life(partial(save_together, place, rank, port, first, say), folder / f"rank-{rank}.log") for rank in (0, 1)
        ]
        os.close(say)
        text = heard(hear, 2)  # until both are saving
        time.sleep(chance.uniform(0.0, 0.2))
        victim = number % 2
        os.kill(pair[victim], signal.SIGKILL)
        status = ended(pair[victim])
        time.sleep(0.2)  # the other one loses the connection or waits for its timeout
        os.kill(pair[1 - victim], signal.SIGKILL)
        ended(pair[1 - victim])
        text += heard(hear)
        os.close(hear)
        lines = text.decode().splitlines()
        said = Said(told(lines, "begun", first - 1), told(lines, "whole", first - 1))
        during += said.begun > said.whole
        log = folder / "intact.log"
        if status != -signal.SIGKILL:
            wrong.append(f"kill {number} did not occur, status {status}")
        elif lived(lambda said=said: _assert_intact(place, said), log) != 0:  # type: ignore[misc]
            wrong.append(f"kill {number}: {log.read_text()[-200:]}")
        lost = max(lost, said.begun - _save_of(latest_checkpoint(place)))
        first = _save_of(latest_checkpoint(place)) + 1
    found = f"{kills - len(wrong)} of {kills} load, {during} kills within a save, at most {max(0, lost)} saves lost"
    name = "SIGKILL of one of two processes that save"
    return Drill(
        name, f"{kills} of {kills} load, at most one lost", found + "; ".join(wrong[:3]), not wrong and lost <= 1
    )


def _assert_intact(folder: Path, said: Said) -> None:
    assert not (why := intact(folder, said)), why
