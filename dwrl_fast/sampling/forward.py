"""The model's forward pass over new tokens with a cache. On a GPU small passes are CUDA graphs, because launching their
kernels takes longer than running them.
"""

import threading
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dwrl_fast.log import warn_once
from dwrl_fast.ops import CacheStep
from dwrl_fast.sampling.cache import Cache, CachedPlan

GRAPHED = 1024  # maximum new tokens of a captured pass; larger passes keep a GPU busy
_capturing = threading.Lock()  # PyTorch captures one graph of a process at a time


class Writer(Protocol):
    """The interface of a `GenerativeModel`, which this package must not import."""

    lm: Any

    def states(self, ids: Tensor, positions: Tensor, plan: CachedPlan) -> Tensor:
        """[Q, H], hidden states of new tokens."""

    def head(self, score: Tensor, token: Tensor) -> Any:
        """`HeadInputs` over hidden states."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    states: Tensor


def recurring(count: int) -> int:
    """`count` rounded up to one of a few numbers, by at most 64 or an eighth."""
    unit = max(64, 1 << max(0, count.bit_length() - 4))
    return -(-count // unit) * unit


class Forward:
    """Forward passes of `model` over `cache`, with constant weights. A graph is captured at the second pass of a shape;
    the first pass compiles kernels. A model that cannot be captured runs without graphs, which is logged.
    """

    def __init__(self, model: Writer, cache: Cache):
        self.model, self.cache, self.device = model, cache, model.lm.device
        self.graphs: dict[tuple[int, int], _Graph | None] = {}
        self.captures = self.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None

    def padded(self, count: int) -> int:
        """The padded number of tokens or tiles for `count` of them."""
        return recurring(count) if self.device.type == "cuda" else count

    def __call__(self, ids: list[int], position: list[int], slot: list[int], tiles: np.ndarray) -> Tensor:
        """[Q, H]: the last hidden states of new tokens. The arguments are the fields of a `CacheStep`. May overwrite
        the result of an earlier call.
        """
        none = np.array([[0, 0, 1, 0, 0]]).repeat(self.padded(len(tiles)) - len(tiles), axis=0)  # visible to no token
        shape = len(ids), len(tiles) + len(none)
        # One tensor, because each copy to a GPU takes as long as a kernel.
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
            # Other threads may score meanwhile: what they do is neither captured nor an error.
            with _capturing, torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                states = self._run(numbers, tokens, tiles)
        except RuntimeError as error:
            self.captures = False
            name, reason = type(self.model.lm).__name__, str(error).partition("\n")[0]
            warn_once(f"{name} cannot be captured in a CUDA graph, so its sampling is slower: {reason}")
            return None
        return _Graph(graph, numbers, states)
