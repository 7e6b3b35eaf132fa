"""The processes (ranks) of one run and their communication.

A rank is one process, with its own GPU if there are GPUs. All ranks run the same program over the same rows. If each
does a share of the work, `gather` gives all of them all results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dwrl_fast.errors import UserError

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `count`. mesh: the device mesh; None for a single process without torchrun, which holds the
    whole model. In a mesh of two dimensions, the ranks along the second dimension together hold the whole model.
    """

    rank: int = 0
    count: int = 1
    mesh: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that logs, renames and exports."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """The number of ranks that a model is sharded over."""
        return 1 if self.mesh is None else int(self.mesh.size(-1))

    def gather(self, value: Value) -> list[Value]:
        """The `value` of every rank, in the order of ranks; returned on all ranks."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def joined(self, own: Sequence[Value], places: Sequence[Sequence[int]]) -> list[Value]:
        """One list joined from the parts of all ranks; returned on all ranks. places: for each rank, the indices of its
        values.
        """
        found: dict[int, Value] = {}
        for each, some in zip(places, self.gather(own), strict=True):
            found |= zip(each, some, strict=True)
        return [found[place] for place in sorted(found)]

    def from_first(self, make: Callable[[], Value]) -> Value:
        """The result of `make` on the first rank, returned on all ranks. A UserError is raised on all ranks."""
        if self.mesh is None:
            return make()
        said: list[Any] = [None]
        if self.first:
            try:
                said = [(make(), None)]
            except UserError as error:
                said = [(None, error)]
        dist.broadcast_object_list(said, src=0)
        value, wrong = said[0]
        if wrong is not None:
            raise wrong
        return value

    def agreed(self, make: Callable[[], Value]) -> Value:
        """The result of `make` on this rank. A UserError of any rank is raised on all ranks, and names its rank unless
        all have the same. All ranks call this together, and `make` must not wait for other ranks.
        """
        if self.mesh is None:
            return make()
        value, wrong = None, None
        try:
            value = make()
        except UserError as error:
            wrong = error
        errors = self.gather(wrong)
        for rank, each in enumerate(errors):
            if each is not None:
                if len(set(map(str, errors))) > 1:
                    each.args = (f"rank {rank}: {each}",)
                raise each
        return value  # type: ignore[return-value]

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of `values` over ranks; returned on all ranks. Any device and shape."""
        if self.mesh is not None:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks; returned on all ranks."""
        if self.mesh is None:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)


ALONE = Ranks()
