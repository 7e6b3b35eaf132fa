"""Finds weights that are not finite, and formats lists of names."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """The parameters that hold NaN or an infinity, by name. For a sharded model only the part of this rank is
    checked.
    """
    found = []
    for name, p in model.named_parameters():
        part = p.to_local() if isinstance(p, DTensor) else p
        # A sum reads a weight once without a copy. Only if it is not finite, the elements are checked.
        if part.is_floating_point() and not part.sum().isfinite() and not part.isfinite().all():
            found.append(name)
    return found


def listed(names: Iterable[str]) -> str:
    """The first six names in order, and the number of the others."""
    some = sorted(names)
    return ", ".join(some[:6]) + (f" and {len(some) - 6} more" if len(some) > 6 else "")
