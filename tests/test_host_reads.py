"""Reads of a training step from the device: each read waits for all work queued before it."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_step import SHAPE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dwrl_fast
from bench.training import lengths
from bench.training.update import setting
from dwrl_fast.batching.batch import Size
from dwrl_fast.methods import StepMetrics

ROOT = Path(dwrl_fast.__file__).parent
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique")


class HostReads(TorchDispatchMode):
    """Counts the reads of values, or of shapes that depend on values, by place. Reads inside operators are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        by_mask = name.startswith(("aten.index.", "aten.index_put")) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if by_mask or name.startswith(READS):
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        ours = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
        self.seen[f"{Path(ours[-1].filename).name}: {ours[-1].name}" if ours else "elsewhere"] += 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> HostReads:
    """Also counts `tolist`, which reads a CPU tensor without an operator."""
    found, tolist = HostReads(), Tensor.tolist

    def spy(x: Tensor) -> list:
        found.note()
        return tolist(x)

    monkeypatch.setattr(Tensor, "tolist", spy)
    return found


def test_a_step_waits_for_nothing_that_is_ours(reads: HostReads) -> None:
    """The policy loss has its own, documented reads. `backward` reads the loss scale, but only on the CPU."""
    it = setting(SHAPE, lengths.synthetic(4, 7, 5), lengths.thought_lengths(6, 32), token_budget=120)
    batches = it.runtime.layout.batches(it.groups)
    assert len(batches) > 1
    expected = {
        "score": {},
        "thought": {"clipped.py: backward": len(batches)},
    }
    for phase, allowed in expected.items():
        reads.seen.clear()
        with reads:
            for batch in batches:
                it.method.loss(phase, it.runtime.model, batch, Size.of(it.groups), StepMetrics()).backward()
        assert reads.seen == allowed, phase


def test_reads_are_seen(reads: HostReads) -> None:
    x = torch.arange(4.0)
    with reads:
        for read in (lambda: x[x > 1], lambda: x.max().item(), x.nonzero, x.tolist, lambda: bool(x[0])):
            before = sum(reads.seen.values())
            read()
            assert sum(reads.seen.values()) == before + 1
