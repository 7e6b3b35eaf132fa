"""Keys and values of the texts that are being written, in blocks of tokens, for every layer of a model."""

from typing import Any, NamedTuple

from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.ops import BLOCK, CacheStep
from dwrl_fast.ops.backend import autocast


def blocks_for(tokens: int) -> int:
    """How many blocks hold a run of so many tokens."""
    return -(-tokens // BLOCK)


class Cache:
    """So many blocks. A layer's tensors are made when it first attends; memory that is never written stays untouched
    on a CPU.
    """

    def __init__(self, blocks: int):
        self.blocks, self.free = blocks, list(range(blocks))[::-1]
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors that were made so far."""
        return sum(x.numel() * x.element_size() for layer in self.layers.values() for x in layer)

    def take(self, count: int) -> list[int]:
        """So many free blocks, which are no longer free."""
        return [self.free.pop() for _ in range(count)]

    def give(self, blocks: list[int]) -> None:
        """These blocks are free again, and the list is emptied."""
        self.free += blocks[::-1]
        blocks.clear()

    def layer(self, number: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, whose new keys are `k` [Q, Hkv, D]."""
        if number not in self.layers:
            dtype = autocast(k[:0]).dtype
            shapes = ops.cache_shapes(k.shape[1], k.shape[2])
            self.layers[number] = tuple(k.new_empty((self.blocks, *shape), dtype=dtype) for shape in shapes)  # type: ignore[assignment]
        return self.layers[number]


class CachedPlan(NamedTuple):
    """What an attention layer takes in place of a tree: `step` over `cache`."""

    cache: Cache
    step: CacheStep

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """[Q, Hq, D], as `ops.cache_attention`."""
        return ops.cache_attention(q, k, v, *self.cache.layer(layer, k), self.step, **options)
