"""Thoughts written by vLLM, in this process or by servers of it (docs/vllm.md). Neither vllm nor httpx2 is imported
before an engine is made.
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
    """The engine that `settings` ask for. config: of the Hugging Face model. trains: whether the device is also needed
    for training.
    """
    if settings.mode == "server":
        from dwrl_fast.sampling.vllm.servers import Servers

        return Servers(settings, dtype, device, ranks, limits.batch_size)
    from dwrl_fast.sampling.vllm.colocated import Colocated

    return Colocated(config, settings, dtype, device, limits, ranks, trains=trains)
