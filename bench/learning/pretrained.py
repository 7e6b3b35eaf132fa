"""What a pretrained model learns from real pairs, method by method.

    python -m dwrl_fast.data --prepare on-topic --source hh.jsonl.gz --longest 450 --output_dir data/on-topic
    python -m bench.learning.pretrained --data data/on-topic --json FILE

Every method trains the model in the folder (or GGUF file) --model on the first --rows pairs of DATA/train.jsonl, one
pass of them, and ranks those of DATA/test.jsonl before and after: with one greedy thought and, where it thinks, with
the mean of four. `before` of a method that thinks is the model's zero-shot score. Learning rates were not searched for:
they are those of SETTINGS. A run that the JSON holds already is not made again, so an interrupted table goes on, and
each run is in the file once it has ended. An interval is the bootstrap's over the held-out rows of one run; other seeds
lie further apart. Nothing is asserted of an order between methods.
"""

import argparse
import json
import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import command
from bench.machine import machine
from dwrl_fast.config import TrainConfig
from dwrl_fast.data.mixture import Part
from dwrl_fast.train import run
from dwrl_fast.training.runlog import read_metrics

TWO = {"score_learning_rate": 2e-5, "thought_learning_rate": 1e-5, "optimizer_state": "per_phase"}
SETTINGS: dict[str, dict[str, Any]] = {
    "dwrl": TWO, "btpo": TWO, "grpo-point": {"learning_rate": 1e-5}, "grpo-pair": {"learning_rate": 1e-5},
    "bt": {"learning_rate": 2e-5},
}  # fmt: skip
SIGNALS = (
    "label_mass",
    "truncation_rate",
    "advantage",
    "effective_groups",
    "clip_fraction",
)  # of the first and the last step
EVALUATED = ("before", "before_4_thoughts", "after", "after_4_thoughts")


def trained(method: str, seed: int, args: argparse.Namespace, work: Path, console: Console) -> dict[str, Any]:
    """One run's figures."""
    files = {name: work / f"{name}.jsonl" for name in ("train", "test")}
    config = TrainConfig(
        model_name_or_path=str(args.model),
        dataset_name=str(files["train"]),
        eval_dataset_name=(Part(str(files["test"])),),
        method=method,  # type: ignore[arg-type]
        rollout_batch_size=args.batch,
        minibatch_size=args.batch // 2,
        num_train_epochs=1,
        max_completion_length=args.tokens,
        num_generations=4,
        eval_votes=4,
        save_steps=0,
        seed=seed,
        output_dir=str(work / f"{method}-{seed}"),
        **SETTINGS[method],
    )
    result = run(config, console)
    metrics = read_metrics(Path(str(config.output_dir)) / "metrics.jsonl")
    reports = {name: result[f"report_{name}"] for name in EVALUATED if f"report_{name}" in result}
    signals = {name: [metrics[i][name] for i in (0, -1)] for name in SIGNALS if name in metrics[0]}
    return {
        "method": method,
        "seed": seed,
        "reports": reports,
        "signals": signals,
        "seconds": result["seconds_by_stage"],
    }


def cut(source: Path, target: Path, rows: int) -> None:
    """The first `rows` lines."""
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(islice(file, rows)), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> Table:
    """Accuracies with their intervals, and seconds."""

    def cell(report: dict[str, Any] | None) -> str:
        return "" if report is None else f"{report['accuracy']:.3f} [{report['low']:.3f}, {report['high']:.3f}]"

    cells = [
        (
            *(row["method"], str(row["seed"])),
            *(cell(row["reports"].get(name)) for name in EVALUATED),
            f"{sum(row['seconds'].values()):.0f}",
        )
        for row in rows
    ]
    headings = ("method", "seed", "before", "before, 4 thoughts", "after", "after, 4 thoughts", "seconds")
    return command.table("held-out accuracy", headings, cells)


def main() -> None:
    """The command: every method and seed that the JSON does not hold yet."""
    parser = command.parser("learning.pretrained", __doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"), help="default models/smollm2")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--methods", nargs="+", default=["bt", "dwrl"], choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=1024, help="pairs to train on (default 1024)")
    parser.add_argument("--held_out", type=int, default=500, help="pairs to evaluate on (default 500)")
    parser.add_argument("--batch", type=int, default=64, help="pairs a rollout batch, two minibatches (default 64)")
    parser.add_argument("--tokens", type=int, default=48, help="of a thought at most (default 48)")
    parser.add_argument("--json", type=Path, required=True, help="where runs are kept and added")
    args = parser.parse_args()
    setting = {"model": args.model.name, "data": args.data.name}  # wherever they lie
    setting |= {name: str(getattr(args, name)) for name in ("rows", "held_out", "batch", "tokens")}
    found: dict[str, Any] = {"benchmark": "pretrained", "setting": setting, "machine": machine(), "runs": []}
    if args.json.exists():
        found = json.loads(args.json.read_text())
        if found["setting"] != setting:
            parser.error(f"{args.json} holds runs of {found['setting']}, and this is {setting}: name another file")
    console = Console(width=150)
    with tempfile.TemporaryDirectory(prefix="pretrained-") as folder:
        work = Path(folder)
        cut(args.data / "train.jsonl", work / "train.jsonl", args.rows)
        cut(args.data / "test.jsonl", work / "test.jsonl", args.held_out)
        for seed in args.seeds:
            for method in args.methods:
                if any((row["method"], row["seed"]) == (method, seed) for row in found["runs"]):
                    continue
                found["runs"].append(trained(method, seed, args, work, console))
                args.json.write_text(json.dumps(found, indent=1) + "\n")
                shutil.rmtree(work / f"{method}-{seed}")
    console.print(table(found["runs"]))


if __name__ == "__main__":
    main()
