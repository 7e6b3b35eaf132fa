"""The training command with a fault: FAULT is "KIND:RANK:STEP", and strikes where torchrun has not restarted yet."""

import os
import signal
from typing import Any

from dwrl_fast import train
from dwrl_fast.console import command
from dwrl_fast.training.trainer import Trainer

kind, rank, step = os.environ.get("FAULT", "none:0:0").split(":")
train_step = Trainer.train_step


def faulty(self: Trainer, *args: Any) -> dict[str, Any]:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if kind != "none" and first and os.environ["RANK"] == rank and self.step == int(step):
        print(f"fault at step {self.step}", flush=True)
        if kind == "raise":
            raise RuntimeError("a planted fault")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[kind])
    return train_step(self, *args)


if __name__ == "__main__":
    setattr(Trainer, "train_step", faulty)  # noqa: B010 - mypy takes no assignment to a method
    command(train.main, ranks=True)
