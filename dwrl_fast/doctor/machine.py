"""Checks of the machine: device, operator backends, memory."""

import logging
import os
from typing import Any

import torch

from dwrl_fast.compute import GIB, Compute, available, multiplies_bfloat16
from dwrl_fast.config import TrainConfig
from dwrl_fast.doctor.finding import Finding
from dwrl_fast.log import logger
from dwrl_fast.methods import Method
from dwrl_fast.ops import extension
from dwrl_fast.ops.backend import choose_backend
from dwrl_fast.ranks import Ranks
from dwrl_fast.scoring import Runtime

OPERATORS = ("linear_logprob", "linear_policy_loss", "yes_no_logprob", "tree_attention", "cache_attention")


def device(compute: Compute, ranks: Ranks) -> Finding:
    """The device, and whether it supports the run's dtype in hardware."""
    kind = str(compute.dtype).removeprefix("torch.")
    if compute.device.type == "cuda":
        gpus = torch.cuda.device_count()
        said = f"{torch.cuda.get_device_name()}, {kind}"
        if ranks.mesh is None and gpus > 1:
            said += f"; 1 of {gpus} GPUs is used: torchrun --nproc-per-node {gpus} starts a process for each"
        if not compute.float32 and not torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("device", "warn", f"{said}, which this GPU only emulates, slowly", "Use --dtype fp32.")
        return Finding("device", "pass", said)
    threads = torch.get_num_threads()
    said = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {kind}, {threads} thread{'s' * (threads > 1)}"
    if not compute.float32 and not multiplies_bfloat16():
        return Finding(
            "device",
            "warn",
            f"{said}; this processor has no instructions for bfloat16, or PyTorch does not know of them: 5 times (with "
            "AVX-512) to 100 times slower than float32",
            "Use --dtype fp32.",
        )
    return Finding("device", "pass", said)


def kernels(compute: Compute) -> Finding:
    """The backend of each operator."""
    x = torch.empty(0, device=compute.device, dtype=compute.dtype)
    level = logger.level
    logger.setLevel(logging.ERROR)  # the finding contains each choice, so it need not be logged
    try:
        found = {name: choose_backend("auto", name, x) for name in OPERATORS}
    finally:
        logger.setLevel(level)
    said = "; ".join(
        f"{', '.join(name for name in found if found[name] == backend)}: {backend}"
        for backend in dict.fromkeys(found.values())
    )
    if "reference" not in found.values():
        return Finding("kernels", "pass", said)
    why = extension.problem() if compute.device.type == "cpu" else "Install Triton: pip install triton."
    command = (why or "").strip().splitlines()[-1].strip()
    return Finding("kernels", "warn", f"{said}; the slow path in plain PyTorch, with the same results", command)


def memory(runtime: Runtime, method: Method, config: TrainConfig, longest: int) -> Finding:
    """Compare the computed memory need of the run on this rank's device with the available memory. longest: tokens of
    the longest sequence before its thought. Activations are not estimated; the token budget bounds them.
    """
    parts = {name: size / GIB for name, size in needed(runtime, method, config, longest).items() if size}
    need = sum(parts.values())
    coming = sum(parts.get(name, 0.0) for name in ("gradients", "optimizer states", "keys and values"))
    free, total = available(runtime.compute.device)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if runtime.compute.device.type == "cpu" else 1
    each = ", ".join(f"{name} {size:.3g}" for name, size in parts.items())
    said = (
        f"{need:.3g} GiB by arithmetic ({each}), plus activations{f', times {beside} ranks' * (beside > 1)}; "
        f"{free:.3g} of {total:.3g} GiB are free, with the weights loaded"
    )
    figures = {f"{name} GiB": size for name, size in parts.items()} | {"free GiB": free, "total GiB": total}
    remedy = (
        "Lower --generation_cache_gib, --generation_batch_size and --token_budget, add --gradient_checkpointing, train "
        "adapters (--use_peft), or take more GPUs."
    )
    if (need - parts.get("keys and values", 0.0)) * beside > total:  # keys and values are an upper bound
        return Finding("memory", "fail", said, remedy, figures)
    return Finding("memory", "warn" if coming * beside > free else "pass", said, remedy, figures)


def needed(runtime: Runtime, method: Method, config: TrainConfig, longest: int) -> dict[str, float]:
    """Bytes needed on this rank's device, by kind."""
    parameters = list(runtime.model.parameters())
    sharded = runtime.sharded
    share = runtime.ranks.parts
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    states = len(method.phases) if method.separate_states else int(bool(method.phases))
    here = not (sharded is not None and sharded.offload)
    replica = None if sharded is None else sharded.replica
    return {
        "weights": here * sum(p.numel() * p.element_size() for p in parameters) / share,
        "gradients": here * 4 * trained / share,
        "optimizer states": here * 8 * states * trained / share,
        "whole copy": 0.0 if replica is None else sum(p.numel() * p.element_size() for p in replica.parameters()),
        "keys and values": _cached(runtime, config, longest),
    }


def _cached(runtime: Runtime, config: TrainConfig, longest: int) -> float:
    """Bytes of keys and values of all thoughts sampled at the same time, if no prefix is shared: an upper bound."""
    if runtime.sampler is None:
        return 0.0
    lm: Any = runtime.model.lm.config.get_text_config()
    width = getattr(lm, "head_dim", None) or lm.hidden_size // lm.num_attention_heads
    heads = getattr(lm, "num_key_value_heads", None) or lm.num_attention_heads
    token = 2 * lm.num_hidden_layers * heads * width * runtime.compute.dtype.itemsize
    thoughts = config.generation_batch_size * (longest + config.max_completion_length)
    return min(config.generation_cache_gib * GIB, thoughts * token)
