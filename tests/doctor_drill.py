"""The doctor over ranks, with one part made to fail. FAULT names the part. "memory", "tokenizer", "rows" and
"model" fail on the second rank alone.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from dwrl_fast.console import command
from dwrl_fast.doctor import examination, machine
from dwrl_fast.doctor.__main__ import main
from dwrl_fast.errors import UserError
from dwrl_fast.models.sharding import Sharded
from dwrl_fast.ranks import Ranks

LOADERS = {"tokenizer": "load_dialog", "rows": "read_rows", "model": "load_judging"}


def nothing(self: Any) -> None:
    """A replica that is never updated."""
    self.stale = False


def averaged(sum_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A backend that returns means instead of sums."""
    return lambda self, x: sum_(self, x) / self.count


def halved(divide: Callable[..., None]) -> Callable[..., None]:
    """Gradients that are wrongly divided between the ranks."""
    return lambda self, factor: divide(self, 2 * factor)


def missing(*args: Any, **options: Any) -> Any:
    """Finds no file."""
    raise UserError("planted: the file is not here")


if __name__ == "__main__":
    second = os.environ["RANK"] == "1"
    if os.environ["FAULT"] == "replica":
        setattr(Sharded, "refresh", nothing)  # noqa: B010 - mypy takes no assignment to a method
    elif os.environ["FAULT"] == "sum":
        setattr(Ranks, "sum", averaged(Ranks.sum))  # noqa: B010
    elif os.environ["FAULT"] == "gradient":
        setattr(FSDPModule, "set_gradient_divide_factor", halved(FSDPModule.set_gradient_divide_factor))  # noqa: B010
    elif os.environ["FAULT"] == "memory" and second:
        machine.available = lambda device: (1e-6, 1e-5)
    elif os.environ["FAULT"] in LOADERS and second:
        setattr(examination, LOADERS[os.environ["FAULT"]], missing)
    command(main, ranks=True)
