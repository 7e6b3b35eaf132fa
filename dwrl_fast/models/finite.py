"""Weights by name: those that are not numbers, and how many are named."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """The parameters that hold NaN or an infinity, by name; of a sharded model, in the part that this rank holds."""
    found = []
    for name, p in model.named_parameters():
        part = p.to_local() if isinstance(p, DTensor) else p
        # A sum reads a weight once and makes no copy of its size; one that is not finite is looked at closely.
        if part.is_floating_point() and not part.sum().isfinite() and not part.isfinite().all():
            found.append(name)
    return found


def listed(names: Iterable[str]) -> str:
    """The first six names in order, and how many more there are."""
    some = sorted(names)
    return ", ".join(some[:6]) + (f" and {len(some) - 6} more" if len(some) > 6 else "")
