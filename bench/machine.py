"""Records the machine, versions, commit and settings of a measurement, and the peak rates of a GPU."""

import functools
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "quack-kernels",
)
QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def machine() -> dict[str, Any]:
    """The machine entry of a report."""
    models = [x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: installed for name in PACKAGES if (installed := _version(name))},
        "commit": commit(),
    }
    return found | (gpu() if torch.cuda.is_available() else {})


def commit() -> str | None:
    """The commit from DWRL_FAST_COMMIT (for a copy without git), otherwise that of the checkout."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return os.environ.get("DWRL_FAST_COMMIT") or git.stdout.strip() or None


def gpu() -> dict[str, Any]:
    """The GPU entry of a report: the first GPU and PyTorch's settings for it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "state": state(),
        "float32_products_in_tf32": torch.backends.cuda.matmul.allow_tf32,
        "bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }


def state() -> dict[str, str]:
    """Driver, clocks, power limit and temperature from nvidia-smi. Nothing is changed."""
    try:
        run = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return {"nvidia-smi": "not found"}
    lines = run.stdout.splitlines()
    return dict(zip(QUERY.split(","), map(str.strip, lines[0].split(",")), strict=True)) if lines else {}


@functools.cache  # measured once per run
def ceilings(side: int = 8192, copied: int = 4 << 30) -> dict[str, float]:
    """The rates that this GPU reaches now: bytes per second of a copy (read and written), and FLOP per second of a
    product [side, side] x [side, side] of random numbers in bfloat16.
    """
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    flops = 2 * side**3 / seconds(lambda: a @ b)
    source = torch.randint(256, (copied,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return {"bytes_per_second": 2 * copied / seconds(lambda: target.copy_(source)), "bf16_flop_per_second": flops}


def seconds(run: Callable[[], object]) -> float:
    """The median of as many runs as fit into a tenth of a second, timed with device events and a cold cache."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median")) / 1e3


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
