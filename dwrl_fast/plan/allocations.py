"""Records the memory and the work of a pass from its operators as they run. Under FakeTensorMode no memory is
allocated.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch
from weakref import finalize

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1)}  # argument indices of their factors
WITHOUT_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"}
GIVEN = {"weights", "optimizer", "gradients", "replica"}  # kinds that operators do not change


@dataclass(slots=True)
class Work:
    """The work of operators. products: FLOPs of matrix products by their smallest dimension. traffic: bytes that all
    other operators read and write. operators: the number of operators, including products. Attention and head are not
    included, because they use this package's own operators.
    """

    products: Counter[int] = field(default_factory=Counter)
    traffic: int = 0
    operators: int = 0


@dataclass(slots=True)
class _Held:
    bytes: int
    kind: str


class Allocations(TorchDispatchMode):
    """Counts live storages by kind: `now`; `most`, at the moment of the largest sum; and `tops`, the maximum of each
    kind at any moment.

    whole: the shapes of the weights that stay gathered; a tensor of such a shape from the backward pass is a gradient
    of one. workspace: the bytes that an operator of this package holds while it runs, from its name and arguments.
    `calls` holds the kinds at each such call, by name.
    """

    def __init__(self, whole: Collection[torch.Size], workspace: Callable[[str, Any], int]):
        super().__init__()
        self.whole, self.workspace = frozenset(whole), workspace
        self.held: dict[int, _Held] = {}
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.tops: Counter[str] = Counter()
        self.calls: dict[str, Counter[str]] = {}
        self.work = Work()
        self.backward = False

    def take(self, tensors: Collection[Tensor], kind: str) -> None:
        """Count the storages of `tensors` as `kind` from here on."""
        for tensor in tensors:
            self._count(tensor._local_tensor if isinstance(tensor, DTensor) else tensor, kind)

    def __enter__(self) -> "Allocations":
        resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:  # FSDP frees and allocates gathered weights in this way
            found = resize(storage, size)
            self._resize(storage._cdata, size)
            return found

        self.patch = patch.object(torch.UntypedStorage, "resize_", resized)
        self.patch.start()
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local tensors follow
        found = func(*args, **(kwargs or {}))
        space, name = func.namespace, func._schema.name.partition("::")[2]
        for tensor, kind in self._kinds(space, name, args, kwargs or {}, found):
            self._count(tensor, kind)
        self._compare(name, self.workspace(name, args) if space == "dwrl_fast" else 0)
        if space == "aten" and not func.is_view and name not in WITHOUT_WORK:
            self._work(name, args, kwargs, found)
        return found

    def _kinds(self, space: str, name: str, args: Any, kwargs: Any, found: Any) -> Iterator[tuple[Tensor, str]]:
        """The input and output tensors of an operator, with the kind that the operator implies."""
        taken, made = list(_tensors((args, kwargs))), list(_tensors(found))
        if name == "split_with_sizes_copy" and space == "fsdp":
            yield from ((tensor, "gathered weights") for tensor in kwargs["out"])
        elif name == "chunk_cat" and space == "fsdp":
            yield from ((tensor, "gathered gradients") for tensor in args[0])
            yield kwargs["out"], "collectives"
        elif name == "_reduce_scatter_base_":
            yield args[0], "gradients"
        elif space in ("fsdp", "c10d"):
            yield from ((tensor, "collectives") for tensor in taken + made)
        else:
            of_weights = name == "_to_copy" and any(self._kind(tensor) == "weights" for tensor in taken)
            for tensor in made:
                gradient = self.backward and tensor.shape in self.whole
                yield tensor, "gathered weights" if of_weights else "gathered gradients" if gradient else ""

    def _kind(self, tensor: Tensor) -> str:
        held = self.held.get(tensor.untyped_storage()._cdata)
        return "" if held is None else held.kind

    def _count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor. kind: empty if the operator does not imply one; a new storage is then an activation."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = self.held.get(key)
        if held is None:
            held = self.held[key] = _Held(0, kind or "activations")
            finalize(storage, self._free, key)
        elif kind and held.kind not in GIVEN:
            self.now[held.kind] -= held.bytes
            self.now[kind] += held.bytes
            held.kind = kind
        self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        held = self.held.get(key)
        if held is not None:
            self.now[held.kind] += size - held.bytes
            held.bytes = size

    def _free(self, key: int) -> None:
        self._resize(key, 0)
        self.held.pop(key, None)

    def _compare(self, name: str, workspace: int) -> None:
        now = self.now if not workspace else self.now + Counter({"head workspace": workspace})
        if workspace and now.total() > self.calls.get(name, Counter()).total():
            self.calls[name] = Counter(now)
        if now.total() > self.most.total():
            self.most = Counter(now)
        for kind, size in now.items():
            self.tops[kind] = max(self.tops[kind], size)

    def _work(self, name: str, args: Any, kwargs: Any, found: Any) -> None:
        self.work.operators += 1
        if name in PRODUCTS:
            one, other = (args[place] for place in PRODUCTS[name])
            rows, inner, columns = one.shape[-2], one.shape[-1], other.shape[-1]
            count = one.shape[0] if one.dim() == 3 else 1
            self.work.products[min(rows, inner, columns)] += 2 * count * rows * inner * columns
            return
        self.work.traffic += sum(t.numel() * t.itemsize for t in _tensors((args, kwargs, found)))


def _tensors(nested: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))
