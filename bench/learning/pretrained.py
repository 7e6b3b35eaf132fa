"""Measures what a pretrained model learns from real pairs, for each variant.

    make smollm2
    python -m bench.learning.pretrained --budget cpu --data data/words --json FILE

DATA is a folder with train.jsonl and test.jsonl, as `python -m dwrl_fast.data --prepare` and `make real` write them.
Each variant trains the model on the first --rows pairs of train.jsonl, one pass, and is evaluated on the first
--held_out pairs of test.jsonl with one greedy thought per response; with --votes 4 also with the mean of four sampled
ones. `zero-shot` is p(Yes) of the untrained model, `judge` its verdict in text on two responses; both are always
evaluated with four thoughts too.

Learning rates: with the first seed, each variant is trained at its own rate times each of --factors. The factor with
the highest accuracy on the --swept pairs after the first --rows pairs is used for the other seeds and for the table.
`bt, 1/4` and `bt, 1/2` train on a share of the pairs: the learning curve of Bradley-Terry. If Bradley-Terry learns
nothing from a data set within the budget, the data set cannot distinguish the other methods.

Every finished run is added to the JSON, and runs in the JSON are not repeated, so an interrupted table can be resumed.
Intervals are bootstrap intervals over the held-out pairs, of the mean over seeds; differences are paired. No order of
variants is asserted.
"""

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import command
from bench.learning.real import untrained
from bench.learning.signals import spread
from bench.machine import machine
from dwrl_fast import Scorer
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.evaluation.judged import judged_report
from dwrl_fast.evaluation.pairs import credit
from dwrl_fast.evaluation.scoring import Steps, score_rows
from dwrl_fast.evaluation.units import Units
from dwrl_fast.methods import METHODS
from dwrl_fast.train import run
from dwrl_fast.training.runlog import read_metrics

BRIEF = {"template": "brief"}  # a small model's thoughts end in time, and its labels are likely (docs/pretrained.md)
TWO = BRIEF | {"score_learning_rate": 2e-5, "thought_learning_rate": 1e-5, "optimizer_state": "per_phase"}
RATES = ("learning_rate", "score_learning_rate", "thought_learning_rate")
SIGNALS = (
    "label_mass", "p_chosen", "p_rejected", "train_accuracy", "truncation_rate", "advantage",
    "effective_groups", "clip_fraction", "grad_norm", "grad_norm_score", "grad_norm_thought",
)  # fmt: skip
SUMMED = ("naive_tokens", "trunk_tokens", "thought_tokens")
ZERO_SHOT_VOTES = 4


class Variant(NamedTuple):
    """options: of the trainer. share: of the training pairs. trains: whether the variant trains."""

    method: str
    options: dict[str, Any]
    share: float = 1.0
    trains: bool = True


COMPARED = {
    "zero-shot": Variant("dwrl", BRIEF, trains=False),
    "judge": Variant("judge", {}, trains=False),
    "bt, 1/4": Variant("bt", {"learning_rate": 2e-5}, share=0.25),
    "bt, 1/2": Variant("bt", {"learning_rate": 2e-5}, share=0.5),
    "bt": Variant("bt", {"learning_rate": 2e-5}),
    "dwrl": Variant("dwrl", TWO),
    "btpo": Variant("btpo", BRIEF | {"learning_rate": 2e-5}),
    "dwrl, unweighted": Variant("dwrl", TWO | {"misalignment_weight": False}),
    "grpo-point": Variant("grpo-point", {"learning_rate": 1e-5}),
    "grpo-pair": Variant("grpo-pair", {"learning_rate": 1e-5}),
    "star-sft": Variant("star-sft", {"learning_rate": 1e-5}),
    "sft": Variant("sft", {"learning_rate": 2e-5}),
}
STEPS = {  # from `bt` to `dwrl` in single changes, and changes of `dwrl`, to isolate what slows learning
    "bt, a thought before": Variant("bt", {"learning_rate": 2e-5, "prefilled_thoughts": True} | BRIEF),
    "dwrl, no thought": Variant("dwrl", TWO | {"max_completion_length": 1}),
    "dwrl, scores alone": Variant("dwrl", TWO | {"thought_learning_rate": 1e-12}),
    "dwrl, likelihood": Variant("dwrl", TWO | {"thought_normalization": "likelihood"}),
    "dwrl, temperature .3": Variant("dwrl", TWO | {"temperature": 0.3}),
    "dwrl, 12 thoughts": Variant("dwrl", TWO | {"num_generations": 12}),
    "dwrl, minibatches of 2": Variant("dwrl", TWO | {"minibatch_size": 2}),
    "dwrl, 3 epochs": Variant("dwrl", TWO | {"num_train_epochs": 3}),
}
VARIANTS = COMPARED | STEPS
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "variants": ["zero-shot", "bt, 1/4", "bt, 1/2", "bt", "dwrl", "btpo"],
        "rows": 64, "swept": 60, "held_out": 150, "batch": 16, "tokens": 32, "votes": 1,
    },
    "gpu": {
        "variants": list(COMPARED), "rows": 1024, "swept": 200, "held_out": 500, "batch": 64, "tokens": 48, "votes": 4,
    },
}  # fmt: skip
Run = dict[str, Any]


def configured(variant: Variant, factor: float, seed: int, args: argparse.Namespace, work: Path) -> TrainConfig:
    """The options of one run; its folder is below `work`."""
    rates = {name: factor * rate for name, rate in variant.options.items() if name in RATES}
    thinks = variant.method not in ("bt", "sft")
    common = {"minibatch_size": args.batch // 2, "num_train_epochs": 1}
    common |= {"max_completion_length": args.tokens, "num_generations": 4} if thinks else {}
    return TrainConfig(
        model_name_or_path=str(args.model),
        dataset_name=str(work / f"{round(variant.share * args.rows)}.jsonl"),
        method=variant.method,  # type: ignore[arg-type]
        rollout_batch_size=args.batch,
        save_steps=0,
        seed=seed,
        output_dir=str(work / "run"),
        **common | variant.options | rates,
    )


def measured(scorer: Scorer, rows: Sequence[Preference], votes: int, seed: int) -> dict[str, Any]:
    """The report on `rows`, and both scores of every pair in nats, that of the better response first."""
    units = Units.of(rows)
    found, _ = score_rows(Steps(scorer, votes, seed), rows)
    scores = [[round(score, 5) for score in row.scores] for row in found]
    return {"report": judged_report(found, seed, units).to_dict(), "scores": scores}


def made(
    name: str,
    factor: float,
    seed: int,
    args: argparse.Namespace,
    work: Path,
    rows: dict[str, list[Preference]],
    console: Console,
) -> Run:
    """One run: trained, if the variant trains, and then evaluated."""
    variant, votes = VARIANTS[name], args.votes
    found: Run = {"variant": name, "factor": factor, "seed": seed}
    started = time.monotonic()
    if variant.trains:
        config = configured(variant, factor, seed, args, work)
        result = run(config, console)
        folder = Path(str(config.output_dir))
        metrics = read_metrics(folder / "metrics.jsonl")
        found["signals"] = {k: [metrics[i][k] for i in (0, -1)] for k in SIGNALS if k in metrics[0]}
        files = sorted((folder / "thoughts").glob("*.jsonl"))
        if files and METHODS[variant.method].thinks:  # `bt` has one prefilled thought a response: no spread
            found["thoughts"] = [spread(files[i]) for i in (0, -1)]
        found["tokens"] = {k: sum(row.get(k, 0) for row in metrics) for k in SUMMED}
        found["seconds"] = result["seconds_by_stage"]
        scorer = Scorer.from_pretrained(folder / "model")
    else:
        votes = ZERO_SHOT_VOTES
        if variant.method == "judge":
            scorer = Scorer.from_pretrained(args.model, method="judge", max_completion_length=4 * args.tokens)
        else:
            scorer = untrained(configured(variant, 1.0, seed, args, work))
    evaluated = {"swept": 1} if variant.trains else {}
    evaluated |= {"greedy": 1} | ({f"{votes}_thoughts": votes} if votes > 1 and scorer.thinks else {})
    for kind, each in evaluated.items():
        found[kind] = measured(scorer, rows["swept" if kind == "swept" else "test"], each, seed)
    found["seconds_in_all"] = time.monotonic() - started
    shutil.rmtree(work / "run", ignore_errors=True)
    return found


def best_factor(runs: Sequence[Run], name: str, seed: int) -> float:
    """The factor with the highest accuracy on the sweep pairs among the runs of a variant with `seed`; for equal
    accuracies, the one with the lower loss.
    """
    some = [one for one in runs if (one["variant"], one["seed"]) == (name, seed)]
    reports = [one["swept"]["report"] for one in some]
    keys = [(report["accuracy"], -(report["nll"] if report["nll"] is not None else np.inf)) for report in reports]
    return float(some[max(range(len(some)), key=keys.__getitem__)]["factor"])


def credits(runs: Sequence[Run], kind: str = "greedy") -> np.ndarray:
    """[pairs], the credit for each held-out pair, as mean over `runs`."""
    scores = torch.tensor([one[kind]["scores"] for one in runs], dtype=torch.float64).numpy()
    return credit(scores[..., 0] - scores[..., 1]).mean(0)


def table(cell: dict[str, Any], reference: str = "bt") -> Table:
    """A table of each variant at its best rate: accuracy over the seeds, and difference from `reference`."""
    runs, first = cell["runs"], cell["setting"]["seeds"][0]
    names = [name for name in VARIANTS if any(one["variant"] == name for one in runs)]
    best: dict[str, list[Run]] = {}
    for name in names:
        some = [one for one in runs if one["variant"] == name]
        factor = best_factor(runs, name, first) if VARIANTS[name].trains else 1.0
        best[name] = [one for one in some if one["factor"] == factor]
    lines = []
    for name, some in best.items():
        right = credits(some)
        voted = next((kind for kind in some[0] if kind.endswith("_thoughts")), None)
        versus = "" if reference not in best or name == reference else _interval(right - credits(best[reference]), "+")
        seconds = [sum(one.get("seconds", {}).values()) for one in some]
        lines.append(
            (
                name,
                f"{some[0]['factor']:g}" if VARIANTS[name].trains else "",
                ", ".join(f"{one['greedy']['report']['accuracy']:.3f}" for one in some),
                _interval(right),
                _interval(credits(some, voted)) if voted else "",
                versus,
                f"{sum(seconds) / len(seconds):.0f}" if any(seconds) else "",
            )
        )
    headings = ("variant", "rate x", "by seed", "accuracy", "4 thoughts", f"less {reference}", "seconds of training")
    return command.table(f"held-out accuracy: {cell['setting']['data']}", headings, lines)


def _interval(values: np.ndarray, sign: str = "") -> str:
    low, high = Units.alone(len(values)).interval(values, seed=0)
    return f"{values.mean():{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def cut(source: Path, target: Path, rows: int, start: int = 0) -> None:
    """Copy `rows` lines, from line `start` (counted from 0) on."""
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(islice(file, start, start + rows)), encoding="utf-8")


def cell_of(found: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """The cell of `found` with this setting, added if it is not there. Seeds and variants may be added to a cell."""
    free = ("seeds", "factors")
    for cell in found["cells"]:
        if all(cell["setting"].get(name) == value for name, value in setting.items() if name not in free):
            return cell
    found["cells"].append({"setting": setting, "machine": machine(), "runs": []})
    return found["cells"][-1]


def main() -> None:
    """The command: all runs that are not in the JSON yet, seed by seed."""
    parser = command.parser("learning.pretrained", __doc__)
    parser.add_argument("--budget", choices=list(BUDGETS), default="cpu", help="sets what follows (default cpu)")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"), help="default models/smollm2")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 3.0], help="of learning rates (default 1 3)")
    parser.add_argument("--rows", type=int, help="pairs to train on")
    parser.add_argument("--swept", type=int, help="pairs that choose the learning rate")
    parser.add_argument("--held_out", type=int, help="pairs to evaluate on")
    parser.add_argument("--batch", type=int, help="pairs of a rollout batch, two minibatches")
    parser.add_argument("--tokens", type=int, help="of a thought at most")
    parser.add_argument("--votes", type=int, help="sampled thoughts of trained models, beside the greedy one")
    parser.add_argument("--json", type=Path, required=True, help="where runs are kept and added")
    args = parser.parse_args()
    for name, value in BUDGETS[args.budget].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    setting = {"model": args.model.name, "data": args.data.name} | BRIEF  # independent of their location
    setting |= {name: getattr(args, name) for name in ("rows", "swept", "held_out", "batch", "tokens", "votes")}
    setting |= {name: getattr(args, name) for name in ("factors", "seeds")}
    found: dict[str, Any] = {"benchmark": "pretrained", "cells": []}
    if args.json.exists():
        found = json.loads(args.json.read_text())
    cell, console = cell_of(found, setting), Console(width=170)
    with tempfile.TemporaryDirectory(prefix="pretrained-") as folder:
        work = Path(folder)
        for share in {VARIANTS[name].share for name in args.variants} | {1.0}:
            rows = round(share * args.rows)
            cut(args.data / "train.jsonl", work / f"{rows}.jsonl", rows)
        cut(args.data / "train.jsonl", work / "swept.jsonl", args.swept, start=args.rows)
        cut(args.data / "test.jsonl", work / "test.jsonl", args.held_out)
        rows = {name: read_preferences(work / f"{name}.jsonl").rows for name in ("swept", "test")}
        for seed in args.seeds:
            for name in args.variants:
                trains = VARIANTS[name].trains
                factors = args.factors if seed == args.seeds[0] else []
                if trains and not factors:
                    factors = [best_factor(cell["runs"], name, args.seeds[0])]
                for factor in factors if trains else [1.0] * (seed == args.seeds[0]):
                    key = (name, factor, seed)
                    if any((one["variant"], one["factor"], one["seed"]) == key for one in cell["runs"]):
                        continue
                    console.rule(f"{name}, rate x {factor:g}, seed {seed}")
                    cell["runs"].append(made(*key, args, work, rows, console))
                    part = args.json.with_suffix(".part")
                    part.write_text(json.dumps(found) + "\n")
                    part.replace(args.json)  # atomic: a part of bench.gpu is killed when its time is over
                    gc.collect()
    console.print(table(cell))


if __name__ == "__main__":
    main()
