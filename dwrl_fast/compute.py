"""Where and in what precision a run computes: device, autocast dtype, and what must be set for runs to repeat
themselves.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dwrl_fast.errors import ConfigError
from dwrl_fast.log import logger

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # the last two of ARM
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
        if dtype == "bf16" and device.type == "cpu":
            _say_slow()
        return cls(device, DTYPES[dtype])

    @property
    def float32(self) -> bool:
        return self.dtype == torch.float32

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.float32 else torch.autocast(self.device.type, self.dtype)


def multiplies_bfloat16() -> bool | None:
    """Whether the processor has instructions for products in bfloat16; None where PyTorch does not say."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every version that we run with
    if capabilities is None:
        return None
    found = capabilities()
    return any(found.get(name, False) for name in BFLOAT16)


def _say_slow() -> None:
    known = multiplies_bfloat16()
    if not known:
        logger.warning(
            "%s: without them a product in bfloat16 takes 5 times (with AVX-512) to 100 times as long as in float32. "
            "Use --dtype fp32.",
            "This processor has no instructions for bfloat16"
            if known is False
            else "PyTorch does not say whether this processor has instructions for bfloat16",
        )


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
