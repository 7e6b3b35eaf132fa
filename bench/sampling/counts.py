"""Counts the computation and the memory reads of a sampler, and lower bounds of their time on this machine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import timed
from bench.sampling.engines import Work
from bench.training.flops import attended_keys, head_flops, trunk_flops
from dwrl_fast.sampling import TreeSampler

READ = 1 << 30  # bytes read to measure the memory rate; more than the caches hold
REPEATS = 3
LEAST = 1e10  # minimum FLOP of a timed product


class Counts(NamedTuple):
    """prefill, decode: tokens that passed through the layers, including padding. attended: keys that decoded tokens
    attend to; prefill_attended: keys for the prefill tokens. passes: how often all weights were read. cached: tokens
    whose keys and values were read from the cache, in all passes. head: rows at the head.
    """

    prefill: int
    decode: int
    prefill_attended: int
    attended: int
    passes: int
    cached: int
    head: int


def plain_counts(work: Work, batch_size: int) -> Counts:
    """The counts of the plain loop, from the lengths: every context once, padded to the longest of its batch; a
    separate cache for every thought, including its context.
    """
    order, size = sorted(map(len, work.contexts)), max(1, batch_size // work.n)
    steps = range(1, work.tokens)  # the first token needs no step, and the last one is not processed
    found = [0] * 7
    for start in range(0, len(order), size):
        some = order[start : start + size]
        longest, rows = max(some), len(some) * work.n
        keys = rows * sum(longest + t for t in steps)
        each = (len(some) * longest, rows * len(steps), attended_keys([longest] * len(some)), keys, work.tokens, keys)
        found = [a + b for a, b in zip(found, (*each, len(some) + rows * len(steps)), strict=True)]
    return Counts(*found)


class Counting:
    """A model that counts the calls of `TreeSampler`."""

    def __init__(self, model: Any):
        self.model = model
        self.tokens = self.attended = self.passes = self.cached = self.rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def states(self, ids: Tensor, positions: Tensor, plan: Any) -> Tensor:
        """Like the model's. A piece of the cache is read once for all new tokens that see it."""
        self.tokens += len(ids)
        self.attended += int((positions + 1).sum())
        self.passes += 1
        self.cached += int(plan.step.tiles[:, 2].sum())
        found: Tensor = self.model.states(ids, positions, plan)
        return found

    def head(self, score: Tensor, token: Tensor) -> Any:
        """Like the model's."""
        self.rows += len(score)
        return self.model.head(score, token)


def tree_counts(sampler: TreeSampler, work: Work) -> Counts:
    """The counts of one run of `sampler`, from the plans of its passes."""
    counting, stops = Counting(sampler.model), sorted(sampler.stop_ids)
    how: dict[str, Any] = {"limits": sampler.limits, "token_budget": sampler.token_budget, "autocast": sampler.autocast}
    other = TreeSampler(counting, stops, **how)
    other.block_bytes = sampler.block_bytes  # type: ignore[method-assign]  # a pass that computes no text
    other.sample(work.contexts, work.n, max_tokens=work.tokens, temperature=1.0, seed=0)
    decode = len(work.contexts) * work.n * (work.tokens - 1)
    attended = work.n * sum(len(ids) + t for ids in work.contexts for t in range(1, work.tokens))
    prefill, before = counting.tokens - decode, counting.attended - attended
    return Counts(prefill, decode, before, attended, counting.passes, counting.cached, counting.rows)


def cached_bytes(lm: Any) -> int:
    """Bytes of the keys and values of one token in all layers."""
    config = lm.config
    channels = 2 * config.num_key_value_heads * lm.base_model.layers[0].self_attn.head_dim
    return int(channels * config.num_hidden_layers * lm.dtype.itemsize)


class Rates(NamedTuple):
    """FLOP per second of the model's products with the rows of decoding and of the prefill; bytes per second of
    reading.
    """

    decode: float
    prefill: float
    read: float


def rates(lm: Any, rows: int, wide: int = 2048) -> Rates:
    """Measure the rates now. rows: of a decoding step. wide: rows of the prefill."""
    weights = [p for p in lm.base_model.layers[0].parameters() if p.dim() == 2]
    long = torch.ones(READ // 4)
    read = READ / min(timed(long.sum) for _ in range(REPEATS))
    return Rates(_products(weights, rows), _products(weights, wide), read)


@torch.no_grad()
def _products(weights: Sequence[Tensor], rows: int) -> float:
    flops = seconds = 0.0
    for weight in weights:
        x = torch.randn(rows, weight.shape[1])
        each = 2 * rows * weight.numel()
        times = max(1, round(LEAST / each))

        def run(x: Tensor = x, weight: Tensor = weight, times: int = times) -> None:
            for _ in range(times):
                torch.nn.functional.linear(x, weight)

        seconds += min(timed(run) for _ in range(REPEATS)) / times
        flops += each
    return flops / seconds


class Bound(NamedTuple):
    """flops: of all products. read: bytes of weights and cache. Both also as seconds at the measured rates."""

    flops: float
    read: float
    computing: float
    reading: float


def bound(lm: Any, counts: Counts, rate: Rates) -> Bound:
    """The bounds of a run with these `counts`. Products and reading can overlap: each is a lower bound, but not their
    sum.
    """
    prefill = trunk_flops(lm, counts.prefill, counts.prefill_attended) / 3  # a forward pass is a third
    decode = (trunk_flops(lm, counts.decode, counts.attended) + head_flops(lm, counts.head)) / 3
    weights = sum(p.nbytes for p in lm.parameters())
    read = counts.passes * weights + counts.cached * cached_bytes(lm)
    return Bound(prefill + decode, read, prefill / rate.prefill + decode / rate.decode, read / rate.read)
