"""The model's pass over new tokens of a cache. On a GPU small passes are CUDA graphs: launching a kernel takes longer
than most of them run.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dwrl_fast.log import warn_once
from dwrl_fast.ops import CacheStep
from dwrl_fast.sampling.cache import Cache, CachedPlan

GRAPHED = 1024  # new tokens: larger passes, which keep a GPU busy, are not captured


class Writer(Protocol):
    """A `GenerativeModel`, of which the room below must not know."""

    lm: Any

    def states(self, ids: Tensor, positions: Tensor, plan: CachedPlan) -> Tensor:
        """[Q, H] of new tokens."""

    def head(self, score: Tensor, token: Tensor) -> Any:
        """`HeadInputs` over hidden states."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    states: Tensor


def recurring(count: int) -> int:
    """`count` or the next of few numbers, at most 64 or an eighth above it."""
    unit = max(64, 1 << max(0, count.bit_length() - 4))
    return -(-count // unit) * unit


class Forward:
    """Passes of `model` over `cache`, while its weights stay as they are. A graph is captured when a shape is met for
    the second time: the first pass compiles what it needs. A model that cannot be captured runs as it is, and that is
    said.
    """

    def __init__(self, model: Writer, cache: Cache):
        self.model, self.cache, self.device = model, cache, model.lm.device
        self.graphs: dict[tuple[int, int], _Graph | None] = {}
        self.captures = self.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None

    def padded(self, count: int) -> int:
        """How many tokens or tiles are given for `count` of them."""
        return recurring(count) if self.device.type == "cuda" else count

    def __call__(self, ids: list[int], position: list[int], slot: list[int], tiles: np.ndarray) -> Tensor:
        """[Q, H]: the last hidden states of new tokens, from what a `CacheStep` holds. What an earlier call gave may be
        overwritten.
        """
        none = np.array([[0, 0, 1, 0, 0]]).repeat(self.padded(len(tiles)) - len(tiles), axis=0)  # seen by no token
        shape = len(ids), len(tiles) + len(none)
        # One tensor, for each copy to a GPU takes as long as a kernel.
        numbers = torch.from_numpy(np.concatenate([ids, position, slot, tiles.ravel(), none.ravel()], dtype=np.int64))
        if not self.captures or len(ids) > GRAPHED:
            return self._run(numbers.to(self.device), *shape)
        if shape not in self.graphs:
            self.graphs[shape] = None
            return self._run(numbers.to(self.device), *shape)
        known = self.graphs[shape] or self._captured(numbers.to(self.device), *shape)
        if known is None:
            return self._run(numbers.to(self.device), *shape)
        self.graphs[shape] = known
        known.numbers.copy_(numbers)
        known.graph.replay()
        return known.states

    def _run(self, numbers: Tensor, tokens: int, tiles: int) -> Tensor:
        ids, position, slot, rest = numbers.split([tokens, tokens, tokens, 5 * tiles])
        plan = CachedPlan(self.cache, CacheStep(position, slot, rest.view(tiles, 5)))
        return self.model.states(ids, position, plan)

    def _captured(self, numbers: Tensor, tokens: int, tiles: int) -> _Graph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                states = self._run(numbers, tokens, tiles)
        except RuntimeError as error:
            self.captures = False
            name, reason = type(self.model.lm).__name__, str(error).partition("\n")[0]
            warn_once(f"{name} cannot be captured in a CUDA graph, so its sampling is slower: {reason}")
            return None
        return _Graph(graph, numbers, states)
