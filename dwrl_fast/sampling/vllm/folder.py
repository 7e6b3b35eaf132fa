"""Weights on their way to a server: a folder of safetensors, written as they come."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dwrl_fast.sampling.vllm.engine import Weights

SHARD = 2**31  # bytes; the most that is held at once, but for the last weight


def write_weights(folder: Path | None, weights: Weights) -> int:
    """Write `weights` into `folder`, some GB a file, and give their bytes. Without a folder they are only gone through,
    as ranks must that hold parts of them.
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
