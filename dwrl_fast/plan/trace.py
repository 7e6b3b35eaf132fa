"""Runs the real model under the real sharding forward and backward on fake tensors, and records its memory and work.
One process simulates all ranks, with a fake process group.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers the collectives for FakeTensorMode
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.errors import ConfigError
from dwrl_fast.log import logger
from dwrl_fast.models.sharding import shard
from dwrl_fast.ops import extension
from dwrl_fast.ops.products import workspace_bytes
from dwrl_fast.plan.allocations import Allocations, Work
from dwrl_fast.plan.lengths import groups
from dwrl_fast.plan.setup import Setup, built
from dwrl_fast.ranks import mesh_of

NUMBERS = (1, 3)  # groups of the two traced passes, which define a line


class Pass(NamedTuple):
    """One micro-batch with gradients, on one rank. tokens: of the backbone. rows: of the head. loss: bytes by kind
    while the head computes its gradients. most: bytes by kind at the moment of the largest sum. layers: the maximum
    activations at any moment. forward, backward: the work.
    """

    tokens: int
    rows: int
    loss: Counter[str]
    most: Counter[str]
    layers: int
    forward: Work
    backward: Work


class Traced(NamedTuple):
    """Two passes of different sizes."""

    small: Pass
    large: Pass

    def at(self, tokens: float, small: float, large: float) -> float:
        """The value at `tokens` on the line through the values of both passes."""
        slope = (large - small) / (self.large.tokens - self.small.tokens)
        return max(0.0, small + slope * (tokens - self.small.tokens))


def trace(setup: Setup, gpus: int, beside: int | None = None, *, accumulates: bool = True) -> Traced:
    """Trace passes on one of `gpus` ranks; a single GPU has no ranks. beside: ranks per machine, with --hsdp.
    accumulates: whether gradients of an earlier micro-batch are in memory.

    Raises ConfigError if the operators are not compiled (plain PyTorch would use more memory), or if torchrun started
    this process.
    """
    problem = extension.problem()
    if problem is not None:
        raise ConfigError(f"the trace needs the compiled operators, which report their sizes: {problem}")
    compute = Compute(torch.device("cpu"), setup.dtype)
    packing = "packed" if setup.config.packing == "padded" else setup.config.packing
    layout = Layout(packing, 1 << 62, 0, compute.device)
    batches = [layout.batches(groups(setup.lengths, setup.method, number))[0] for number in NUMBERS]
    with FakeTensorMode() as mode, _ranks(gpus, beside) as mesh, _quiet():
        model = built(setup.config, setup.dtype)
        if mesh is not None:
            shard(model, mesh, compute)
        small, large = (_passed(setup, model, _fake(mode, batch), compute, accumulates) for batch in batches)
    return Traced(small, large)


@contextmanager
def _ranks(count: int, beside: int | None) -> Iterator[Any]:
    """The mesh of `count` simulated ranks; None for one."""
    if count == 1:
        yield None
        return
    if dist.is_initialized():
        raise ConfigError("a plan is made by one process: start it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        with unset_fake_temporarily():
            mesh = mesh_of("cpu", count, beside)
        yield mesh
    finally:
        dist.destroy_process_group()


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without log lines about backends: they are chosen for CPU tensors, not for the planned device."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fake(mode: FakeTensorMode, record: Any) -> Any:
    """`record`, a dataclass, with its tensors replaced by fake ones."""
    changed = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = mode.from_tensor(value)
        elif dataclasses.is_dataclass(value) and field.name == "plan":
            changed[field.name] = _fake(mode, value)
    return dataclasses.replace(record, **changed)


def _passed(setup: Setup, model: Any, batch: Batch, compute: Compute, accumulates: bool) -> Pass:
    parameters = list(model.parameters())
    root = [torch.Size(setup.shape.head)] if setup.shape.head else []
    seen = Allocations(root, _workspace(setup))
    seen.take(parameters, "weights")
    trained = [p for p in parameters if p.requires_grad]
    for p in trained if accumulates else ():
        p.grad = torch.zeros_like(p)
    seen.take([p.grad for p in trained if p.grad is not None], "gradients")
    with seen:
        with compute.autocast():
            value = model.idle(batch)
        held, forward, seen.work, seen.backward = Counter(seen.now), seen.work, Work(), True
        value.backward()
    for p in trained:
        p.grad = None
    loss = max(seen.calls.values(), key=lambda kinds: kinds.total(), default=held)
    return Pass(batch.trunk_tokens, batch.head_rows, loss, seen.most, seen.tops["activations"], forward, seen.work)


def _workspace(setup: Setup) -> Any:
    """A function that gives the working memory of a head operator on the planned device, from its name and
    arguments.
    """

    def bytes_of(name: str, args: Sequence[Any]) -> int:
        if not name.startswith("linear_"):
            return 0
        hidden, head = [x for x in args if isinstance(x, Tensor) and x.dim() == 2][:2]
        last = name.endswith("backward") or name == "linear_policy_loss"
        trained = setup.shape.root.trained > 0
        return workspace_bytes(
            len(hidden), head.shape, setup.dtype, setup.profile.device, gradients=last, trained=trained
        )

    return bytes_of
