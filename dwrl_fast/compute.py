"""Where and in what precision a run computes: device, autocast dtype, and what must be set for runs to repeat
themselves.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dwrl_fast.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Compute:
    """Weights are float32 masters on `device`; the forward runs under `autocast()` when `dtype` is bfloat16."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def resolve(cls, dtype: str) -> "Compute":
        """`auto` is fp32 on a CPU and bf16 on a GPU. float16 is refused: its loss scale comes too late for gradients
        formed in forward.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "bf16" if device.type == "cuda" else "fp32"
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return cls(device, DTYPES[dtype])

    @property
    def float32(self) -> bool:
        return self.dtype == torch.float32

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.float32 else torch.autocast(self.device.type, self.dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in the same order on every machine; for a model so small that more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step_seed(seed: int, stream: str, step: int) -> int:
    """A seed for one use of randomness, from the run's seed alone: a resumed run draws what the whole run would have
    drawn.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
