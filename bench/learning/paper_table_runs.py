"""The runs of paper_table.py: each trains a variant on a cell's pairs from its backbone, then evaluates it pair by
pair.
"""

import dataclasses
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dwrl_fast import Scorer, embedded, train
from dwrl_fast.compute import one_thread
from dwrl_fast.config import TrainConfig, parse_train
from dwrl_fast.data import read_preferences
from dwrl_fast.data.mixture import Part
from dwrl_fast.methods import METHODS
from dwrl_fast.objectives.agreement import order_accuracy, rank_grid
from dwrl_fast.progress import Display
from dwrl_fast.scoring import marginal_scores
from dwrl_fast.training.runlog import read_metrics

Split = Literal["dev", "test"]

# The papers' Table 4, the ablations of Table 3, the STaR family, and other methods for pairs.
VARIANTS: dict[str, tuple[str, ...]] = {
    "dwrl": (),
    "dwrl, weight off": ("--misalignment_weight", "off"),
    "btpo": ("--method", "btpo"),
    "bt": ("--method", "bt"),
    "bt, prefilled thoughts": ("--method", "bt", "--prefilled_thoughts"),
    "pairrm": ("--method", "pairrm"),
    "gram": ("--method", "gram"),
    "genrm": ("--method", "genrm"),
    "grpo-pair": ("--method", "grpo-pair"),
    "grpo-point": ("--method", "grpo-point"),
    "star-sft": ("--method", "star-sft"),
    "star-dpo": ("--method", "star-dpo"),
    "star-rationalizer": ("--method", "star-rationalizer"),
    "judge": ("--method", "judge"),
    "sft": ("--method", "sft"),
    "dpo": ("--method", "dpo"),
}
BASELINE = "dwrl"
RATES = ("learning_rate", "score_learning_rate", "thought_learning_rate")
TAIL = 10  # number of last rollout batches whose training accuracy is averaged


@dataclass(frozen=True, order=True)
class Cell:
    """The pairs of one task, and the seed of the pairs and the backbone."""

    task: embedded.Task
    easy_fraction: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the task in the table."""
        return self.task if self.task == "attributes" else f"{self.task}, easy {self.easy_fraction:g}"

    @property
    def folder(self) -> str:
        """The folder name of the cell."""
        return f"{self.name.replace(', ', '-').replace(' ', '-')}-seed-{self.seed}"


@dataclass(frozen=True, order=True)
class Run:
    """One line of the results file. `factor` multiplies the stored learning rates."""

    cell: Cell
    variant: str
    factor: float = 1.0
    split: Split = "test"

    @property
    def folder(self) -> str:
        """The folder name of the run, below that of the cell."""
        return f"{self.variant.replace(', ', '-').replace(' ', '-')}-x{self.factor:.3g}-{self.split}"


def backbone(cell: Cell, root: Path) -> embedded.Embedded:
    """The cell's pairs and warmed-up model, reused if they exist."""
    folder = root / cell.folder / "embedded"
    if (folder / embedded.RECORD).exists():
        return embedded.Embedded.read(folder)
    with one_thread():
        return embedded.prepare(folder, cell.seed, task=cell.task, easy_fraction=cell.easy_fraction)


def configure(run: Run, made: embedded.Embedded, folder: Path, *more: str) -> TrainConfig:
    """The stored recipe with the cell's files. more: further options."""
    held_out = made.test if run.split == "test" else made.dev
    options = [*VARIANTS[run.variant], *more, "--seed", str(run.cell.seed)]
    changes: dict[str, Any] = {"eval_votes": 0, "save_steps": 0, "output_dir": str(folder)}
    if run.variant == "judge":
        model = made.model_for(METHODS[run.variant].template)
        options += ["--model_name_or_path", str(model), "--eval_dataset_name", str(held_out)]
        changes["max_completion_length"] = embedded.THOUGHT_LIMIT
        return dataclasses.replace(parse_train(options), **changes)
    config = train.on_embedded(train.configure(options), made)
    rates = {name: getattr(config, name) for name in RATES}
    changes |= {name: rate * run.factor for name, rate in rates.items() if rate is not None}
    return dataclasses.replace(config, eval_dataset_name=(Part(str(held_out)),), **changes)


def execute(run: Run, root: Path, *more: str) -> dict[str, Any]:
    """Train and evaluate. Returns the record for the results file. Uses one thread: two concurrent runs fill two cores,
    and sums have the same order on every machine.
    """
    with one_thread():
        made = backbone(run.cell, root)
        folder = root / run.cell.folder / run.folder
        config = configure(run, made, folder, *more)
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed before its line was written
        folder.mkdir(parents=True)
        with Display(Console(quiet=True)) as display:
            result = train.train(config, folder, display, saved=config)
        found = judged(folder / "model", made.test if run.split == "test" else made.dev, config.seed)
    rows = read_metrics(folder / "metrics.jsonl")
    spent = result["seconds_by_stage"]
    before, after = result["report_before"], result.get("report_after") or result["report_before"]
    phases = sum(name.startswith("learning_rate_") for name in rows[0]) if rows else 0
    tail = [row["train_accuracy"] for row in rows[-TAIL:] if row.get("train_accuracy") is not None]
    return asdict(run) | {
        "credits": found,
        "before": before,
        "after": after,
        "train_accuracy": sum(tail) / len(tail) if tail else None,
        "seconds": sum(v for k, v in spent.items() if k not in ("evaluate", "save")),
        "warm_up_seconds": made.seconds,
        "sampled_tokens": sum(row.get("thought_tokens", 0) for row in rows) or prefilled_tokens(folder),
        "trained_tokens": sum(row["naive_tokens"] for row in rows) * phases,
        "learning_rates": {name: getattr(config, name) for name in RATES if getattr(config, name) is not None},
    }


def judged(model: Path, pairs: Path, seed: int) -> list[float]:
    """The credit of the saved model for each pair: 1 right, 0 wrong, one half for a tie."""
    scorer = Scorer.from_pretrained(model, generation_batch_size=1024)
    groups = scorer.score_groups(read_preferences(str(pairs)).rows, seed=seed)
    return order_accuracy(marginal_scores(groups), rank_grid([found.group.ranks for found in groups])).tolist()


def prefilled_tokens(folder: Path) -> int:
    """The number of thought tokens written before training; 0 if there are none."""
    path = folder / "prefilled.jsonl"
    lines = path.read_text(encoding="utf-8").strip("\n").split("\n") if path.exists() else []
    return sum(len(json.loads(line)["ids"]) for line in lines[1:])  # the first line says which model wrote them
