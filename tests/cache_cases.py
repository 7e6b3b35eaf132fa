"""Trees of texts that are passed to cache_attention in calls of every kind, with the expected results."""

from collections.abc import Iterator
from typing import Any

import torch
from attention_cases import Plan, attended
from rounding import Rounded, assert_within
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.ops import CacheStep, tiles


class Cache:
    """The tokens of a tree in blocks of their own nodes, drawn among more blocks than are needed; NaN until written.

    x: q, k and v of all U tokens, as `attention_cases.inputs` draws them.
    """

    def __init__(self, plan: Plan, x: dict[str, Tensor], seed: int = 0) -> None:
        self.plan, self.x = plan, x
        u, (_, heads, d) = len(x["q"]), x["k"].shape
        forest = tiles.forest(plan, u)
        self.below, self.place = (torch.from_numpy(y).long() for y in forest.tokenwise())
        needed = int((-(-(plan.stop - plan.start) // ops.BLOCK)).sum())
        free = torch.randperm(2 * needed + 1, generator=torch.Generator().manual_seed(seed))
        self.slot = torch.empty(u, dtype=torch.int64)
        self.pieces: list[tuple[int, int, int]] = []  # block, and the tokens [first, last) of the tree that it holds
        for start, stop in zip(plan.start.tolist(), plan.stop.tolist(), strict=True):
            for first in range(start, stop, ops.BLOCK):
                block, last = int(free[len(self.pieces)]), min(first + ops.BLOCK, stop)
                self.slot[first:last] = block * ops.BLOCK + torch.arange(last - first)
                self.pieces.append((block, first, last))
        device, dtype = x["k"].device, x["k"].dtype
        self.keys, self.values = (
            torch.full((len(free), *shape), torch.nan, device=device, dtype=dtype)
            for shape in ops.cache_shapes(heads, d)
        )
        self.kept = torch.zeros(u, dtype=torch.bool)

    def step(self, tokens: Tensor) -> CacheStep:
        """Of new tokens, ascending, whose ancestors are kept or among them. They count as kept from now on."""
        self.kept[tokens] = True
        rows = []
        for block, first, last in self.pieces:
            count = int(self.kept[first:last].sum())
            start, stop = torch.searchsorted(tokens, torch.tensor([first, int(self.below[first])])).tolist()
            if count:  # a piece that none of the tokens sees is allowed
                rows.append((block, int(self.place[first]), count, start, stop))
        return CacheStep(self.place[tokens], self.slot[tokens], torch.tensor(rows, dtype=torch.int64).reshape(-1, 5))

    def run(self, tokens: Tensor, backend: str, **options: Any) -> Tensor:
        q, k, v = (self.x[n].detach()[tokens.to(self.x[n].device)] for n in "qkv")
        step = CacheStep(*(y.to(self.keys.device) for y in self.step(tokens)))
        return ops.cache_attention(q, k, v, self.keys, self.values, step, backend=backend, **options)


def by_position(plan: Plan, run: int, first: int = 0) -> list[Tensor]:
    """All positions before `first` at once, and then so many positions a call: 1 is a decode step of every text."""
    place = torch.from_numpy(tiles.forest(plan, int(plan.stop[-1])).tokenwise()[1])
    call = torch.where(place < first, 0, (place - first).div(run, rounding_mode="floor") + (1 if first else 0))
    return [(call == n).nonzero().squeeze(1) for n in call.unique().tolist()]


def at_random(plan: Plan, seed: int = 0) -> Iterator[Tensor]:
    """Texts that are at different places: of every node whose ancestors are through, none to many of its tokens."""
    g = torch.Generator().manual_seed(seed)
    at = plan.start.clone()
    while bool((at < plan.stop).any()):
        tokens: list[int] = []
        for m, up in enumerate(plan.parent.tolist()):
            if up >= 0 and at[up] < plan.stop[up]:
                continue
            most = int(torch.tensor([0, 1, 9, 130])[torch.randint(4, (), generator=g)])
            end = min(int(at[m]) + most, int(plan.stop[m]))
            tokens += range(int(at[m]), end)
            at[m] = end
        if tokens:
            yield torch.tensor(tokens)


def ways(plan: Plan) -> dict[str, list[Tensor]]:
    """The calls by which a tree's tokens come in; of each way all tokens."""
    longest = tiles.forest(plan, int(plan.stop[-1])).longest_path
    return {
        "at once": by_position(plan, longest),
        "in chunks": by_position(plan, 37),
        "prefill, then several tokens": by_position(plan, 5, longest - 12),
        "prefill, then single tokens": by_position(plan, 1, longest - 4),
        "at random": list(at_random(plan)),
    }


def found(plan: Plan, x: dict[str, Tensor], calls: list[Tensor], backend: str, **options: Any) -> Tensor:
    """[U, Hq, D]: what every token got in its call."""
    cache = Cache(plan, x)
    out = torch.full_like(x["q"].detach(), torch.nan)
    for tokens in calls:
        out[tokens.to(out.device)] = cache.run(tokens, backend, **options)
    assert cache.kept.all()
    return out


def limit(plan: Plan, x: dict[str, Tensor], **options: Any) -> Rounded:
    """[U, Hq, D]: attention over the tree, and how far from it what its tokens get may be, however they came in."""
    return attended(x, plan, **options)[0].moved(lambda y: y.transpose(0, 1))


def assert_accurate(bound: Rounded, *outs: Tensor) -> None:
    for out in outs:
        assert_within({"out": out}, {"out": bound})
