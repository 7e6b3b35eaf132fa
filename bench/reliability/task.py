"""The training task of the drills: a small embedded task with 30 rollout batches over three epochs, on one thread."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dwrl_fast import embedded, train
from dwrl_fast.config import TrainConfig
from dwrl_fast.embedded import Embedded, Sizes, Warmup
from dwrl_fast.embedded.options import on_embedded

SIZES = Sizes(train=78, dev=16, test=16)  # 234 rows in batches of 8: epochs end within batches, and the last is smaller
CASES: dict[str, dict[str, Any]] = {
    "dwrl, minibatch": {"method": "dwrl", "alternate": "minibatch"},
    "dwrl, rollout": {"method": "dwrl", "alternate": "rollout"},
    "dwrl, joint": {"method": "dwrl", "alternate": "joint"},
    "star-dpo": {"method": "star-dpo"},
}
TIMED = ("seconds", "tokens_per_second", "share_")  # values that differ between all runs


def made(folder: Path, plan: Warmup = embedded.WARMUP, sizes: Sizes = SIZES) -> Embedded:
    """The pairs and the warmed-up model in `folder`, created if they are missing."""
    if (folder / embedded.RECORD).exists():
        return Embedded.read(folder)
    return embedded.prepare(folder, 0, sizes=sizes, plan=plan)


def small(task: Embedded, folder: Path, **changes: Any) -> TrainConfig:
    """A run of 30 rollout batches in `folder` with a checkpoint after every update."""
    options: dict[str, Any] = {
        "num_generations": 4,
        "max_completion_length": 16,
        "rollout_batch_size": 8,
        "minibatch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "save_steps": 1,
        "save_updates": 1,
        "output_dir": str(folder),
        "resume_from_checkpoint": "auto",
    }
    config = on_embedded(TrainConfig(**options | changes), task)
    return dataclasses.replace(config, eval_dataset_name=())


def run(config: TrainConfig) -> dict[str, Any]:
    """Run to the end. Returns the content of result.json."""
    torch.set_num_threads(1)
    return train.run(config, Console(width=200))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of all bits of all tensors, with their names."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def random_state() -> str:
    """A digest of the random generators of PyTorch and NumPy in this process. Python seeds its own generator again in
    every fork.
    """
    found = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16)
    found.update(repr(np.random.get_state()).encode())
    return found.hexdigest()


def written(folder: Path) -> dict[str, Any]:
    """The output of a run that must be equal in all runs: weights, thoughts and metrics, by name."""
    found: dict[str, Any] = {
        "weights": hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    }
    for path in sorted((folder / "thoughts").glob("*.jsonl")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[f"step {row['step']}"] = {name: value for name, value in row.items() if not name.startswith(TIMED)}
    return found
