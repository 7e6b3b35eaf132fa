"""The device, its memory and the precision of a run, and the seeds and settings that make it reproducible."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from dwrl_fast.errors import ConfigError, UserError
from dwrl_fast.log import logger
from dwrl_fast.ops import extension

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # the last two are on ARM
GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Compute:
    """The device and the dtype of the forward and backward pass. Weights are float32 masters on `device`."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def resolve(cls, dtype: str) -> "Compute":
        """From the option --dtype: fp32, bf16, or auto (fp32 on a CPU, bf16 on a GPU).

        Raises ConfigError for any other value. float16 is not supported: it needs a loss scale, and here the forward
        pass already computes gradients, before a loss scale could be applied.
        Raises UserError if the C++ operators are compiled for another PyTorch.
        """
        other = extension.refusal()
        if other is not None:
            raise UserError(other)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "bf16" if device.type == "cuda" else "fp32"
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        if dtype == "bf16" and device.type == "cpu":
            _say_slow()
        return cls(device, DTYPES[dtype])

    @property
    def float32(self) -> bool:
        """Whether everything is computed in float32."""
        return self.dtype == torch.float32

    def autocast(self) -> AbstractContextManager:
        """A context for the forward pass: torch.autocast if the dtype is bfloat16."""
        return nullcontext() if self.float32 else torch.autocast(self.device.type, self.dtype)


def multiplies_bfloat16() -> bool | None:
    """Whether the processor has instructions for products in bfloat16; None if PyTorch does not know."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # missing in some supported versions
    if capabilities is None:
        return None
    found = capabilities()
    return any(found.get(name, False) for name in BFLOAT16)


def _say_slow() -> None:
    known = multiplies_bfloat16()
    if not known:
        logger.warning(
            "%s: a matrix product in bfloat16 takes 5 times (with AVX-512) to 100 times as long as in float32. Use "
            "--dtype fp32.",
            "This processor has no instructions for bfloat16"
            if known is False
            else "PyTorch does not say whether this processor has instructions for bfloat16",
        )


def available(device: torch.device) -> tuple[float, float]:
    """Free and total GiB of the GPU, or of the memory that the machine or its container allows for a process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free / GIB, total / GIB
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = total
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        limit, used = ((CGROUP / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            held = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
            given_up = int(held["inactive_file"])  # cached file pages, which the kernel can free
            total, free = min(total, int(limit)), min(free, int(limit) - int(used) + given_up)
    except (OSError, StopIteration, KeyError):  # not Linux, or not in a container
        pass
    return free / GIB, total / GIB


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` reports that memory ran out. PyTorch uses an error class for this on GPUs, and only a message
    text on CPUs.
    """
    said = ("can't allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in said)


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which PyTorch uses one thread, so that sums have the same order on every machine. Meant for models
    so small that more threads would not be faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step_seed(seed: int, stream: str, step: int) -> int:
    """A seed of 63 bits for one use of randomness: the use named `stream` in step `step` of a run with `seed`.

    It depends on nothing else, so a resumed run draws the same numbers as an uninterrupted one.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
