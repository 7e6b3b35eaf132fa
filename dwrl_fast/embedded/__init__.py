"""The embedded task: a tiny model, warmed up on generated critiques, and pairs on which DWRL learns on two CPU cores.

It needs no pretrained model and no download: `prepare` initialises the model, trains it, and writes model and pairs
into a folder in the same formats as a user's own.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.embedded import attributes
from dwrl_fast.embedded.arrays import EVALUATE, RATE, warmup_arrays
from dwrl_fast.embedded.task import draw_claims, prompts, write_pairs
from dwrl_fast.embedded.templates import TEMPLATES, UNTRAINED
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.embedded.warmup import Progress, Warmup, draw_model, state_reached, warm_up
from dwrl_fast.models.model import GenerativeModel
from dwrl_fast.models.pretrained import save_pretrained

__all__ = [
    "EVALUATE",
    "RATE",
    "RECORD",
    "THOUGHT_LIMIT",
    "Embedded",
    "Sizes",
    "Task",
    "Warmup",
    "prepare",
    "recipe",
]

Task = Literal["sums", "attributes"]

RECORD = "embedded.json"  # written last: a folder with this file is complete
THOUGHT_LIMIT = 16  # tokens; the longest well-formed thought, of the pairwise format, has 15


@dataclass(frozen=True)
class Sizes:
    """Pairs in each split. Dev and test hold only hard pairs, because easy pairs would raise every figure."""

    train: int = 5120
    dev: int = 512
    test: int = 512


@dataclass(frozen=True)
class Embedded:
    """The paths, and the state of the model at the start of reinforcement learning.

    drawn: the arguments of `prepare` that pairs and model depend on; None if an older version wrote the folder.
    """

    model: Path
    train: Path
    dev: Path
    test: Path
    seconds: float
    state: dict[str, float]  # shares of correct thoughts: see warmup.state_reached
    drawn: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> "Embedded":
        """What `prepare` has written in `folder`."""
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return cls(**found | {name: folder / Path(found[name]).name for name in ("model", "train", "dev", "test")})

    def model_for(self, kind: str) -> Path:
        """The model folder whose card has the template of this kind. The model is the same in all folders."""
        return self.model if kind == "dialog" else self.model.with_name(f"model-{kind}")


def recipe(method: str) -> Path:
    """The YAML file with the options of a method's default run."""
    return Path(__file__).with_name(f"{method}.yaml")


SIZES = Sizes()
WARMUP = Warmup()


def prepare(
    folder: Path,
    seed: int,
    *,
    task: Task = "sums",
    easy_fraction: float = 0.7,
    progress: Progress | None = None,
    sizes: Sizes = SIZES,
    plan: Warmup = WARMUP,
) -> Embedded:
    """Write the pairs and the warmed-up model under `folder`, all drawn from `seed`.

    `easy_fraction` is the share of training pairs whose rejected response is obviously wrong; the task `attributes`
    (attributes.py) has none. `progress` is called with the stage, the steps done, the total steps, and figures.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"{split}.jsonl" for split in ("train", "dev", "test")}
    data_rng, warmup_rng = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    for split, path in paths.items():
        count = getattr(sizes, split)
        if task == "attributes":
            attributes.write_split(path, split, count, data_rng)
        else:
            share = easy_fraction if split == "train" else 0.0
            write_pairs(path, *draw_claims(prompts(split), count, share, data_rng))

    model = draw_model(plan, seed)
    draw = attributes.attribute_arrays if task == "attributes" else warmup_arrays
    warm_up(model, plan, prompts("train"), warmup_rng, progress, draw)
    state = state_reached(model, prompts("dev"), 1024, seed) if task == "sums" else {}
    drawn = {"task": task, "seed": seed, "easy_fraction": easy_fraction}
    made = Embedded(folder / "model", **paths, seconds=time.perf_counter() - started, state=state, drawn=drawn)
    _save(made, GenerativeModel(model))
    (folder / RECORD).write_text(json.dumps(asdict(made), default=str, indent=1) + "\n", encoding="utf-8")
    return made


def _save(made: Embedded, model: GenerativeModel) -> None:
    tokenizer = make_tokenizer()
    for kind, template in TEMPLATES.items():
        chat = (Dialog if kind == "dialog" else SingleTurn)(tokenizer, template, "correctness")
        card = {
            "method": UNTRAINED[kind],
            "score_normalization": "yes_no",
            "temperature": 1.0,
            "max_completion_length": THOUGHT_LIMIT,
        }
        save_pretrained(made.model_for(kind), model, chat, card)
