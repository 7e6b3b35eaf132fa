"""Thoughts from vLLM, in this process or from vLLM servers (docs/vllm.md). vllm and httpx2 are imported only when an
engine is created.
"""

from typing import Any

import torch

from dwrl_fast.ranks import Ranks
from dwrl_fast.sampling.sampler import Limits
from dwrl_fast.sampling.vllm.adapter import server_command
from dwrl_fast.sampling.vllm.engine import Answer, Ask, Engine, VllmSettings
from dwrl_fast.sampling.vllm.sampler import VllmSampler

__all__ = ["Answer", "Ask", "Engine", "VllmSampler", "VllmSettings", "make_engine", "server_command"]


def make_engine(
    settings: VllmSettings,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    limits: Limits,
    *,
    trains: bool,
) -> Engine:
    """The engine for `settings`. config: of the Hugging Face model. trains: whether the device is also used for
    training.
    """
    if settings.mode == "server":
        from dwrl_fast.sampling.vllm.servers import Servers

        return Servers(settings, dtype, device, ranks, limits.batch_size)
    from dwrl_fast.sampling.vllm.colocated import Colocated

    return Colocated(config, settings, dtype, device, limits, ranks, trains=trains)
