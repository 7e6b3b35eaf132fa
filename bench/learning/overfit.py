"""Tests learning on real text: models with random weights overfit real pairs under the tokenizer and template of their
family.

    python -m bench.learning.overfit --tokenizers DIR --data hh.jsonl.gz gsm8k.jsonl.gz

For every tokenizer folder below DIR, data file and method, a small model is initialised at random and trained on the
first pairs that fit the length limit. Then the same pairs are evaluated with the command's own evaluation (one greedy
thought). A random model knows nothing, so it learnt its accuracy from the pairs. The result says nothing about unseen
pairs. `--against bench/results/cpu_overfit.json` tells for each accuracy whether it is within the prediction interval
of the stored one.
"""

import json
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import command
from bench.learning.intervals import comparison, next_share
from bench.machine import machine
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import read_preferences
from dwrl_fast.data.mixture import Part
from dwrl_fast.dialog import Dialog
from dwrl_fast.models.pretrained import load_tokenizer
from dwrl_fast.train import run

FAMILIES = {"qwen2.5": "qwen2", "llama3": "llama"}
METHODS: dict[str, dict[str, Any]] = {
    "dwrl": {
        "score_learning_rate": 2e-3,
        "thought_learning_rate": 1e-4,
        "optimizer_state": "per_phase",
        "num_generations": 4,
        "max_steps": 12,
    },
    "bt": {"learning_rate": 2e-3, "max_steps": 40},
}


def shape(family: str, vocabulary: int) -> dict[str, Any]:
    """A config.json of the family, small in everything except the vocabulary."""
    return {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }


def write_first(source: Path, target: Path, dialog: Dialog, pairs: int, longest: int) -> None:
    """The first `pairs` rows of `source` whose prompt and longest response have at most `longest` tokens."""
    fitting = (
        row
        for row in read_preferences(str(source)).rows
        if max(dialog.plain(row.prompt, response).response.stop for response in row.responses) <= longest
    )
    with target.open("w", encoding="utf-8") as file:
        for row in islice(fitting, pairs):
            chosen, rejected = ([{"role": "assistant", "content": response}] for response in row.responses)
            file.write(json.dumps({"prompt": row.prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def main() -> None:
    """The command: train and evaluate every combination, print a line for each and write the JSON."""
    parser = command.parser("learning.overfit", __doc__)
    parser.add_argument("--tokenizers", type=Path, required=True, help="a folder of tokenizer folders: qwen2.5, llama3")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="pair files")
    parser.add_argument("--pairs", type=int, default=32, help="training pairs of each file (default 32)")
    parser.add_argument("--longest", type=int, default=160, help="tokens of prompt and response at most (default 160)")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--against", type=Path, help="such a JSON, of another machine")
    options = parser.parse_args()

    against = json.loads(options.against.read_text()) if options.against else {"rows": []}
    stored = {row["case"]: row["after"] for row in against["rows"]}
    rows = []
    console = Console()
    work = Path(tempfile.mkdtemp(prefix="overfit-"))
    for family in options.families:
        folder = options.tokenizers / family
        tokenizer = load_tokenizer(str(folder))
        config_file = work / family / "config.json"
        config_file.parent.mkdir()
        config_file.write_text(json.dumps(shape(FAMILIES[family], len(tokenizer))))
        dialog = Dialog(tokenizer)
        for source in options.data:
            name = source.name.split(".")[0]
            pairs = work / family / f"{name}.jsonl"
            write_first(source, pairs, dialog, options.pairs, options.longest)
            for method in options.methods:
                started = time.monotonic()
                config = TrainConfig(
                    model_config=str(config_file),
                    tokenizer_name_or_path=str(folder),
                    dataset_name=str(pairs),
                    eval_dataset_name=(Part(str(pairs)),),
                    method=method,  # type: ignore[arg-type]
                    rollout_batch_size=options.pairs,
                    minibatch_size=options.pairs // 4,
                    max_completion_length=12,
                    eval_votes=4,
                    seed=options.seed,
                    output_dir=str(work / family / f"{name}-{method}"),
                    **METHODS[method],
                )
                result = run(config, console)
                rows.append(
                    {
                        "case": f"{family}/{name}/{method}",
                        "pairs": result["rows"],
                        "before": result["accuracy_before"],
                        "after": result["accuracy_after"],
                        "seconds": time.monotonic() - started,
                    }
                )
    shutil.rmtree(work)
    for row in rows:
        print(
            f"{row['case']:<36} {row['pairs']} pairs  {row['before']:.3f} -> {row['after']:.3f}  {row['seconds']:.0f} s"
        )
    if options.against:
        found = [
            (row["case"], stored[row["case"]], row["after"], next_share(stored[row["case"]], row["pairs"]))
            for row in rows
            if row["case"] in stored
        ]
        console.print(comparison("after training", found))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
