"""Transfers weights to a server through a folder of safetensors."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dwrl_fast.sampling.vllm.engine import Weights

SHARD = 2**31  # bytes; at most this much is in memory, plus the last weight


def write_weights(folder: Path | None, weights: Weights) -> int:
    """Write `weights` into `folder` as files of some GB, and return their bytes. Without a folder, only iterate over
    the weights, as ranks with shards must do.
    """
    held: dict[str, Tensor] = {}
    size, files, total = 0, 0, 0
    for name, weight in weights:
        total += weight.nbytes
        if folder is None:
            continue
        held[name] = weight.cpu().contiguous()
        size += weight.nbytes
        if size >= SHARD:
            files += 1
            save_file(held, folder / f"model-{files:05d}.safetensors", metadata={"format": "pt"})
            held, size = {}, 0
    if held and folder is not None:
        save_file(held, folder / f"model-{files + 1:05d}.safetensors", metadata={"format": "pt"})
    return total
