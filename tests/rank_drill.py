"""The training command with a fault. FAULT is "KIND:RANK:STEP" and occurs unless torchrun has restarted. For the kind
`later`, STEP is a time in milliseconds after the start of training.
"""

import os
import signal
import threading
from typing import Any

from dwrl_fast import train
from dwrl_fast.console import command
from dwrl_fast.training.trainer import Trainer

kind, rank, step = os.environ.get("FAULT", "none:0:0").split(":")
train_step = Trainer.train_step


def faulty(self: Trainer, *args: Any) -> dict[str, Any]:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == rank:
        if kind == "later" and self.step == 0:
            threading.Timer(int(step) / 1000, strike, (self, "kill")).start()
        elif kind not in ("none", "later") and self.step == int(step):
            strike(self, kind)
    return train_step(self, *args)


def strike(trainer: Trainer, kind: str) -> None:
    print(f"fault at step {trainer.step}", flush=True)
    if kind == "raise":
        raise RuntimeError("a planted fault")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[kind])


if __name__ == "__main__":
    setattr(Trainer, "train_step", faulty)  # noqa: B010 - mypy takes no assignment to a method
    command(train.main, ranks=True)
