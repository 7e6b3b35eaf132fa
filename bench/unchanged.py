"""Checks that a redesign changed no number: short runs of every method in two checkouts must be equal bit for bit.

    python -m bench.unchanged --before ../old-checkout                       # the embedded task, every method
    python -m bench.unchanged --before ../old-checkout --pairs pairs.jsonl --model models/smollm2
    python -m bench.unchanged --before ../old-checkout --pairs pairs.jsonl --tokenizers DIR

Each run is `python -m dwrl_fast.train` in a separate process in one of the checkouts, with one thread and float32, so
any two versions can be compared. The older checkout creates the embedded model and its pairs. Weights, thoughts and
metrics are compared, except times and rates. With --model, two steps of that model on those pairs are compared instead
of the embedded task; with --tokenizers, two steps of the training of `bench.learning.overfit`. The exit status is 1 if
anything differs.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench import command
from bench.learning import overfit
from dwrl_fast.dialog import Dialog
from dwrl_fast.models.pretrained import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    """A run on the embedded task. recipe: the file with its options. model: the suffix of the model folder's name."""

    method: str
    recipe: str
    model: str = ""
    changes: Mapping[str, Any] = {}


DUAL = Case("dwrl", "dwrl")
CASES: dict[str, Case] = {
    "dwrl": DUAL,
    "dwrl-rollout": DUAL._replace(changes={"alternate": "rollout"}),
    "dwrl-padded": DUAL._replace(changes={"packing": "padded"}),
    "dwrl-packed": DUAL._replace(changes={"packing": "packed"}),
    "dwrl-lora": DUAL._replace(changes={"use_peft": True}),
    "btpo": Case(
        "btpo",
        "dwrl",
        changes={"score_learning_rate": None, "thought_learning_rate": None, "optimizer_state": "shared"},
    ),
    "bt": Case("bt", "bt"),
    "bt-prefilled": Case("bt", "bt-prefilled", changes={"prefilled_thoughts": True}),
    "pairrm": Case("pairrm", "pairrm", "-direct"),
    "gram": Case("gram", "gram", "-direct"),
    "genrm": Case("genrm", "genrm", "-direct"),
    "grpo-pair": Case("grpo-pair", "grpo-pair", "-pairwise"),
    "grpo-point": Case("grpo-point", "grpo-point", "-pointwise"),
    "star-sft": Case("star-sft", "star-sft", "-pairwise"),
    "star-dpo": Case("star-dpo", "star-dpo", "-pairwise"),
    "star-rationalizer": Case("star-rationalizer", "star-rationalizer", "-pairwise"),
    "sft": Case("sft", "sft"),
    "dpo": Case("dpo", "dpo"),
}
SMALL = {"rollout_batch_size": 32, "minibatch_size": 16, "max_steps": 3, "dtype": "fp32"}
PRETRAINED = {"rollout_batch_size": 2, "minibatch_size": 2, "max_steps": 2, "num_generations": 2, "dtype": "fp32"}
PRETRAINED |= {"max_completion_length": 16, "learning_rate": 1e-5}
VARIES = ("seconds", "share_", "tokens_per_second", "time", "versions")  # parts of names of times and rates


def train(checkout: Path, options: Mapping[str, Any], folder: Path) -> None:
    """Run `dwrl_fast.train` of that checkout into `folder`. Exit status 3 (nothing was trained) is a valid result."""
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**options, "output_dir": str(folder)}))
    run = subprocess.run(
        [sys.executable, "-m", "dwrl_fast.train", "--config", str(file)],
        cwd=checkout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if run.returncode not in (0, 3):
        sys.exit(f"{checkout}, {folder.name}:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")


def options_of(case: Case, checkout: Path, made: Path) -> dict[str, Any]:
    """The options of `case`: those of the embedded task in that checkout, made smaller, with the files in `made`."""
    recipes = checkout / "dwrl_fast" / "embedded"
    options = yaml.safe_load((recipes / f"{case.recipe}.yaml").read_text())
    if case.method == "star-rationalizer":
        options["rationalizer_template"] = str(recipes / "rationalizer.yaml")
    files = {"model_name_or_path": str(made / f"model{case.model}"), "dataset_name": str(made / "train.jsonl")}
    return options | SMALL | files | {"method": case.method} | dict(case.changes)


def overfitted(tokenizers: Path, source: Path, work: Path) -> dict[str, dict[str, Any]]:
    """The options for two steps of `bench.learning.overfit` on the first pairs of `source`."""
    runs = {}
    for family, kind in overfit.FAMILIES.items():
        tokenizer = load_tokenizer(str(tokenizers / family))
        config, pairs = work / f"{family}.json", work / f"{family}.jsonl"
        config.write_text(json.dumps(overfit.shape(kind, len(tokenizer))))
        overfit.write_first(source, pairs, Dialog(tokenizer), 32, 160)
        files = {"model_config": config, "tokenizer_name_or_path": tokenizers / family, "dataset_name": pairs}
        named = {name: str(path) for name, path in files.items()} | {"max_completion_length": 12}
        for method, options in overfit.METHODS.items():
            runs[f"{family}-{method}"] = named | options | SMALL | {"method": method, "max_steps": 2}
    return runs


def digest(folder: Path) -> dict[str, str]:
    """The output of a run by name: a hash of each tensor file, and of each metric and thought that must be equal."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors" and "checkpoint-" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        elif path.name == "metrics.jsonl" or path.parent.name == "thoughts":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                for key, value in json.loads(line).items():
                    if not any(part in key for part in VARIES):
                        found[f"{name}:{number} {key}"] = json.dumps(value)
    return found


def compare(case: str, before: dict[str, str], after: dict[str, str]) -> bool:
    """Print the first differences between two runs of a case. Returns whether the runs are equal."""
    names = [name for name in before | after if before.get(name) != after.get(name)]
    weights = sum(name.endswith(".safetensors") for name in before)
    print(f"{case:<20} {len(before):>5} values, {weights} weight files: {'the same' if not names else 'DIFFERENT'}")
    for name in names[:6]:
        print(f"    {name}: {before.get(name)} -> {after.get(name)}")
    return not names and weights > 0


def main() -> None:
    """The command: run every case in both checkouts, and exit with status 1 if anything differs."""
    parser = command.parser("unchanged", __doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout with its operators built")
    parser.add_argument("--after", type=Path, default=ROOT, help="the other one (default: this one)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--model", type=Path, help="compare two steps of this model in place of the embedded task")
    parser.add_argument("--tokenizers", type=Path, help="compare two steps of bench.learning.overfit instead")
    parser.add_argument("--pairs", type=Path, help="the pairs for --model and --tokenizers")
    options = parser.parse_args()
    if (options.model or options.tokenizers) and options.pairs is None:
        parser.error("--model and --tokenizers need --pairs, a file of preference pairs")
    checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}

    with tempfile.TemporaryDirectory(prefix="unchanged-") as name:
        work = Path(name)
        if options.model is not None:
            files = {"model_name_or_path": str(options.model.resolve()), "dataset_name": str(options.pairs.resolve())}
            runs = {options.model.name: PRETRAINED | files}
        elif options.tokenizers is not None:
            runs = overfitted(options.tokenizers.resolve(), options.pairs, work)
        else:
            train(checkouts["before"], SMALL | {"max_steps": 1}, work / "made")
            runs = {
                case: options_of(CASES[case], checkouts["before"], work / "made" / "embedded") for case in options.cases
            }
        same = []
        for case, given in runs.items():
            for when, checkout in checkouts.items():
                train(checkout, given, work / when / case)
            same.append(compare(case, *(digest(work / when / case) for when in checkouts)))
            for when in checkouts:
                shutil.rmtree(work / when / case)
    sys.exit(not all(same))


if __name__ == "__main__":
    main()
