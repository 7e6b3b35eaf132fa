"""The key-value cache of the texts that are being sampled, in blocks of tokens, for every layer of a model."""

from typing import Any, NamedTuple

from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.ops import BLOCK, CacheStep
from dwrl_fast.ops.backend import autocast


def blocks_for(tokens: int) -> int:
    """The number of blocks for a run of `tokens` tokens."""
    return -(-tokens // BLOCK)


class Cache:
    """A fixed number of blocks. The tensors of a layer are allocated when it first attends. On a CPU, memory that is
    never written is never mapped.
    """

    def __init__(self, blocks: int):
        self.blocks, self.free = blocks, list(range(blocks))[::-1]
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors allocated so far."""
        return sum(x.numel() * x.element_size() for layer in self.layers.values() for x in layer)

    def take(self, count: int) -> list[int]:
        """Allocate `count` free blocks."""
        return [self.free.pop() for _ in range(count)]

    def give(self, blocks: list[int]) -> None:
        """Free these blocks and empty the list."""
        self.free += blocks[::-1]
        blocks.clear()

    def layer(self, number: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer; `k` [Q, Hkv, D], its new keys, gives shape and dtype."""
        if number not in self.layers:
            dtype = autocast(k[:0]).dtype
            shapes = ops.cache_shapes(k.shape[1], k.shape[2])
            self.layers[number] = tuple(k.new_empty((self.blocks, *shape), dtype=dtype) for shape in shapes)  # type: ignore[assignment]
        return self.layers[number]


class CachedPlan(NamedTuple):
    """The plan for an attention layer in sampling: `step` over `cache`."""

    cache: Cache
    step: CacheStep

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """[Q, Hq, D], the result of `ops.cache_attention`."""
        return ops.cache_attention(q, k, v, *self.cache.layer(layer, k), self.step, **options)
