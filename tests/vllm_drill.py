"""The training command under torchrun. The thoughts of one rank, SLOW, take a few seconds longer."""

import os
import time
from typing import Any

from dwrl_fast import train
from dwrl_fast.console import command
from dwrl_fast.sampling.vllm.servers import Servers

complete = Servers.complete


def slow(self: Servers, *args: Any) -> Any:
    if os.environ["RANK"] == os.environ["SLOW"]:
        time.sleep(3)
    return complete(self, *args)


if __name__ == "__main__":
    setattr(Servers, "complete", slow)  # noqa: B010 - mypy takes no assignment to a method
    command(train.main, ranks=True)
