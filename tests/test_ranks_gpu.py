"""FSDP2 under NCCL with one rank computes the same as one process without it."""

import shutil
from pathlib import Path

import pytest
from test_ranks_runs import folder, run, weights  # noqa: F401 - a fixture

from dwrl_fast.training.runlog import read_metrics

pytestmark = pytest.mark.gpu
EXACT = ("thought_tokens", "trained_tokens")
CLOSE = ("loss", "thought_loss", "grad_norm_score", "grad_norm_thought")


def metrics(folder: Path, name: str, ranks: int, *options: str) -> list[dict]:  # noqa: F811
    done, there = run(folder, name, ranks, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(there / "metrics.jsonl")


@pytest.mark.parametrize("options", [(), ("--cpu_offload",), ("--reshard_after_backward", "off")], ids=str)
def test_in_float32(folder: Path, options: tuple[str, ...]) -> None:  # noqa: F811
    """The thoughts are the same, and the losses differ only by the order of sums."""
    one = metrics(folder, "one", 0, "--dtype", "fp32")
    found = metrics(folder, f"fp32-{len(options)}-{'-'.join(options)}", 1, "--dtype", "fp32", *options)
    for a, b in zip(one, found, strict=True):
        assert all(a[k] == b[k] for k in EXACT), (a, b)
        assert all(abs(a[k] - b[k]) < 1e-4 * max(1, abs(a[k])) for k in CLOSE), (a, b)
    shutil.rmtree(folder / "one")


@pytest.mark.parametrize("method", ["dwrl", "bt"])
def test_in_bfloat16(folder: Path, method: str) -> None:  # noqa: F811
    """FSDP also casts what autocast keeps in float32, so the first losses differ by bfloat16's rounding."""
    options = ("--method", method)
    one, found = (metrics(folder, f"{method}-{ranks}", ranks, *options)[0] for ranks in (0, 1))
    assert abs(one["loss"] - found["loss"]) < 0.02 * abs(one["loss"]), (one, found)


def test_a_checkpoint_goes_on_to_the_bit(folder: Path) -> None:  # noqa: F811
    whole, there = run(folder, "whole", 1)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    shutil.copytree(there / "checkpoint-000002", folder / "half" / "checkpoint-000002")
    done, resumed = run(folder, "half", 1, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0 and weights(resumed) == weights(there), done.stdout + done.stderr
