"""Measures the speed of this machine's device: the profile from which `dwrl_fast.plan` predicts times."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.tree import TreePlan
from dwrl_fast.compute import Compute, available
from dwrl_fast.doctor.finding import Finding
from dwrl_fast.doctor.ranks import SIZE, seconds_of
from dwrl_fast.plan import Profile
from dwrl_fast.plan.allocations import Allocations
from dwrl_fast.ranks import Ranks

REPEATS, SUMS = 5, 4
COLD, FEW = 12, 64  # number of weights used in turn, for products with at most this many rows
SMALLEST = {"cpu": (8, 32, 64, 128, 256, 512, 1024, 2048), "cuda": (64, 256, 1024, 4096, 8192)}
WIDE = {"cpu": 2048, "cuda": 8192}
NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}  # numbers read and written: more than fit into the caches
TOKENS, HEADS, CHANNELS = 1024, 8, 64  # shape of the attention
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "vocab_size": 16}


def measured(compute: Compute, ranks: Ranks, clock: Callable[[], float] = time.perf_counter) -> Profile:
    """Measure the device of this process in a few seconds of `clock`; all ranks call this together. With several ranks
    the links are measured too: within one machine, or across machines.
    """
    timer = Timer(compute, clock)
    device = compute.device.type
    memory = _memory(timer)
    link, links = memory, "no link was measured (one process)"
    if ranks.count > 1:
        taken = max(
            ranks.gather(seconds_of(lambda: ranks.sum(torch.ones(SIZE, device=compute.device)), compute.device))
        )
        link = 2 * (ranks.count - 1) / ranks.count * 4 * SIZE / taken
        links = f"links by a sum over {ranks.count} ranks"
    kind = str(compute.dtype).removeprefix("torch.")
    named = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Profile(
        name=named,
        source=f"measured by dwrl_fast.doctor: {named}, {kind}; {links}",
        device="cuda" if device == "cuda" else "cpu",
        memory_gib=available(compute.device)[1],
        products={size: _products(timer, size) for size in SMALLEST[device]},
        attention=_attention(timer),
        memory=memory,
        link=link,
        network=link,
        operator=_operator(timer),
        overlaps=device == "cuda",
    )


def told(found: Profile, path: str) -> Finding:
    """The profile as a finding."""
    fastest = max(found.products.values())
    figures = {"products": fastest, "attention": found.attention, "memory": found.memory, "operator": found.operator}
    said = (
        f"products up to {fastest / 1e9:,.0f} GFLOP/s, attention {found.attention / 1e9:,.0f}, memory "
        f"{found.memory / 1e9:,.1f} GB/s, an operator {found.operator * 1e6:.1f} us; written to {path}"
    )
    return Finding("profile", "pass", said, figures=figures)


class Timer:
    """Measures runs with `clock`. On a machine with other work, use the process's own time."""

    def __init__(self, compute: Compute, clock: Callable[[], float]):
        self.compute, self.clock = compute, clock

    def __call__(self, run: Callable[[], object]) -> float:
        """The median of several runs, after one warm-up run."""
        found = []
        for _ in range(REPEATS + 1):
            started = self.clock()
            run()
            if self.compute.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(self.clock() - started)
        return statistics.median(found[1:])

    def drawn(self, *shape: int) -> Tensor:
        """Random numbers of this shape."""
        return torch.randn(*shape, device=self.compute.device, dtype=self.compute.dtype)


def _products(timer: Timer, smallest: int) -> float:
    """FLOPs per second from the mean time of three products that have `smallest` as one of their dimensions. Products
    with few rows use weights that are not in a cache, like those of a model.
    """
    wide = WIDE[timer.compute.device.type]
    taken, flops = 0.0, 0
    for rows, inner, columns in ((smallest, wide, wide), (wide, smallest, wide), (wide, wide, smallest)):
        one = timer.drawn(rows, inner)
        weights = [timer.drawn(columns, inner) for _ in range(COLD if rows <= FEW else 1)]
        taken += timer(partial(_each, one, weights)) / len(weights)
        flops += 2 * rows * inner * columns
    return flops / taken


def _each(x: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        torch.nn.functional.linear(x, weight)


def _memory(timer: Timer) -> float:
    """Bytes per second of an in-place addition. In place, because new memory of that size would first have to be mapped
    page by page.
    """
    one, other = (timer.drawn(NUMBERS[timer.compute.device.type]) for _ in "ab")
    return 3 * one.nbytes * SUMS / timer(partial(_sums, one, other))


def _sums(one: Tensor, other: Tensor) -> None:
    for _ in range(SUMS):
        one.add_(other)


def _attention(timer: Timer) -> float:
    """FLOPs per second of causal attention over one sequence, forward and backward."""
    plan = TreePlan(torch.tensor([0]), torch.tensor([TOKENS]), torch.tensor([-1]))
    q, k, v = (timer.drawn(TOKENS, HEADS, CHANNELS).requires_grad_() for _ in "qkv")
    pairs = TOKENS * (TOKENS + 1) // 2
    return 12 * HEADS * CHANNELS * pairs / timer(lambda: ops.tree_attention(q, k, v, plan).sum().backward())


def _operator(timer: Timer) -> float:
    """Seconds of an operator call on almost no data, forward and backward: its overhead."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        lm: Any = LlamaForCausalLM(LlamaConfig(**TINY)).to(timer.compute.device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=timer.compute.device)

    def run() -> None:
        with timer.compute.autocast():
            lm.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()

    seen = Allocations((), lambda name, args: 0)
    with seen:
        run()
    return timer(run) / seen.work.operators
