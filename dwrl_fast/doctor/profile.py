"""What this machine's device does in a second, measured: the profile that `dwrl_fast.plan` predicts times from."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.tree import TreePlan
from dwrl_fast.compute import Compute
from dwrl_fast.doctor.finding import Finding
from dwrl_fast.doctor.machine import available
from dwrl_fast.doctor.ranks import SIZE, seconds_of
from dwrl_fast.plan import Profile
from dwrl_fast.plan.allocations import Allocations
from dwrl_fast.ranks import Ranks

REPEATS = 5
SMALLEST = {"cpu": (8, 32, 64, 128, 256, 512, 1024, 2048), "cuda": (64, 256, 1024, 4096, 8192)}
WIDE = {"cpu": 2048, "cuda": 8192}
NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 28}  # of what is read and written: on a CPU as large as activations are
TOKENS, HEADS, CHANNELS = 1024, 8, 64  # of the attention
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "vocab_size": 16}


def measured(compute: Compute, ranks: Ranks) -> Profile:
    """The device of this process, all ranks together; some seconds. Links are measured where there are several ranks:
    within one machine, or over whatever lies between them.
    """
    device = compute.device.type
    memory = _memory(compute)
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
        products={size: _products(compute, size) for size in SMALLEST[device]},
        attention=_attention(compute),
        memory=memory,
        link=link,
        network=link,
        operator=_operator(compute),
        overlaps=device == "cuda",
    )


def told(found: Profile, path: str) -> Finding:
    """The profile as a line of the report."""
    fastest = max(found.products.values())
    figures = {"products": fastest, "attention": found.attention, "memory": found.memory, "operator": found.operator}
    said = (
        f"products up to {fastest / 1e9:,.0f} GFLOP/s, attention {found.attention / 1e9:,.0f}, memory "
        f"{found.memory / 1e9:,.1f} GB/s, an operator {found.operator * 1e6:.1f} us; written to {path}"
    )
    return Finding("profile", "pass", said, figures=figures)


def _seconds(run: Callable[[], object], compute: Compute) -> float:
    """The median of some runs, after one."""
    found = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        run()
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def _drawn(compute: Compute, *shape: int) -> Tensor:
    return torch.randn(*shape, device=compute.device, dtype=compute.dtype)


def _products(compute: Compute, smallest: int) -> float:
    """FLOPs a second, the mean time of the three products with this as one of their dimensions."""
    wide = WIDE[compute.device.type]
    taken, flops = 0.0, 0
    for rows, inner, columns in ((smallest, wide, wide), (wide, smallest, wide), (wide, wide, smallest)):
        one, other = _drawn(compute, rows, inner), _drawn(compute, columns, inner)  # a linear layer's weight
        taken += _seconds(lambda one=one, other=other: torch.nn.functional.linear(one, other), compute)  # type: ignore[misc]
        flops += 2 * rows * inner * columns
    return flops / taken


def _memory(compute: Compute) -> float:
    """Bytes a second of a sum into new memory."""
    one, other = (_drawn(compute, NUMBERS[compute.device.type]) for _ in "ab")
    return 3 * one.nbytes / _seconds(lambda: one + other, compute)


def _attention(compute: Compute) -> float:
    """FLOPs a second of one causal sequence, forward and backward."""
    plan = TreePlan(torch.tensor([0]), torch.tensor([TOKENS]), torch.tensor([-1]))
    q, k, v = (_drawn(compute, TOKENS, HEADS, CHANNELS).requires_grad_() for _ in "qkv")
    pairs = TOKENS * (TOKENS + 1) // 2
    taken = _seconds(lambda: ops.tree_attention(q, k, v, plan).sum().backward(), compute)
    return 12 * HEADS * CHANNELS * pairs / taken


def _operator(compute: Compute) -> float:
    """Seconds that an operator of a model takes that has next to nothing to compute, forward and backward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        lm: Any = LlamaForCausalLM(LlamaConfig(**TINY)).to(compute.device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=compute.device)

    def run() -> None:
        with compute.autocast():
            lm.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()

    seen = Allocations((), lambda name, args: 0)
    with seen:
        run()
    return _seconds(run, compute) / seen.work.operators
