"""The training command with a fault: FAULT is "KIND:RANK:STEP", and strikes where torchrun has not restarted yet. Of
kind `later`, STEP is a time in milliseconds after training began; of kind `memory`, the tokens of a micro-batch past
which memory does not suffice. Of the kinds `loss` and `sampler`, which give NaN, every rank prints after each step what
it has skipped, and a digest of the weights that it samples with.
"""

import os
import signal
import threading
from typing import Any

import torch

from bench.reliability.task import digest
from dwrl_fast import train
from dwrl_fast.console import command
from dwrl_fast.errors import NotFiniteError
from dwrl_fast.training.trainer import Trainer

kind, rank, step = os.environ.get("FAULT", "none:0:0").split(":")
train_step = Trainer.train_step


def faulty(self: Trainer, *args: Any) -> dict[str, Any]:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == rank:
        if kind == "later" and self.step == 0:
            threading.Timer(int(step) / 1000, strike, (self, "kill")).start()
        elif kind == "memory":
            short_of_memory(self, int(step))
        elif kind not in ("none", "later") and self.step == int(step):
            strike(self, kind)
    found = train_step(self, *args)
    if kind in ("loss", "sampler"):
        sharded = self.policy.runtime.sharded
        assert sharded is not None and sharded.replica is not None
        sharded.refresh()
        weights = digest(dict(sharded.replica.named_parameters()))
        print(f"step {self.step} rank {self.ranks.rank}: skipped {self.skipped}, {weights}", flush=True)
    return found


def strike(trainer: Trainer, kind: str) -> None:
    print(f"fault at step {trainer.step}", flush=True)
    if kind == "raise":
        raise RuntimeError("a planted fault")
    if kind in ("loss", "sampler"):
        sampler: Any = trainer.rollout.sampler
        once(*((trainer.method, "loss") if kind == "loss" else (sampler.sampler, "sample")))
        return
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[kind])


def once(owner: Any, name: str) -> None:
    """The next call of a method gives NaN: a loss as its value, a sampler as its error."""
    method = getattr(owner, name)

    def bad(*args: Any, **options: Any) -> Any:
        setattr(owner, name, method)
        if name == "loss":
            return method(*args, **options) * torch.nan
        raise NotFiniteError("the sampler's log-probs are not finite")

    setattr(owner, name, bad)


def short_of_memory(trainer: Trainer, most: int) -> None:
    """From now on a micro-batch of more than `most` tokens runs out of memory on this rank."""
    loss = trainer.method.loss

    def bad(phase: str, model: Any, batch: Any, *rest: Any) -> Any:
        if batch.trunk_tokens > most:
            print(f"fault at {batch.trunk_tokens} tokens", flush=True)
            raise torch.OutOfMemoryError("planted: tried to allocate 9 bytes")
        return loss(phase, model, batch, *rest)

    setattr(trainer.method, "loss", bad)  # noqa: B010 - mypy takes no assignment to a method


if __name__ == "__main__":
    setattr(Trainer, "train_step", faulty)  # noqa: B010 - mypy takes no assignment to a method
    command(train.main, ranks=True)
