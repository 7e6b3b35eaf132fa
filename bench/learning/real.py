"""Trains a pretrained model to judge real text within a time limit: `make real`.

    python -m bench.learning.real [--data FILE] [--minutes 45]

By default the model of `make smollm2` learns which of two definitions belongs to a word, from WordNet (see
bench/wordnet.py). With --data it learns which response answers which prompt, from the preferred responses of any
preference file or data set; the pairs are made like those of `python -m dwrl_fast.data --prepare on-topic`. It prints
the accuracy on held-out pairs before and after training, with intervals, and the thoughts about both responses of three
pairs, before and after. A gain is not guaranteed: the amount of training within the time limit depends on the machine.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import command
from bench.wordnet import NotFetched, write
from dwrl_fast import Scorer
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.data.mixture import Part
from dwrl_fast.data.prepare import FILES, ON_TOPIC, prepare_data_set
from dwrl_fast.errors import ConfigError, UserError
from dwrl_fast.methods import METHODS
from dwrl_fast.scoring import ScoredGroup
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.train import run
from dwrl_fast.training.policy import load_judging

HELD_OUT, LONGEST, SHOWN = (
    200,
    450,
    3,
)  # pairs; characters of a prompt with its response; pairs whose thoughts are shown


def pairs(data: str | None, folder: Path) -> Path:
    """The folder of train.jsonl and test.jsonl, created if it is missing. Raises ConfigError if it was made from a
    different source of that name.
    """
    name = "words" if data is None else f"on-topic-{Path(data).name.split('.')[0].replace(':', '-')}"
    made, source = folder / name, data or str(folder / "wordnet" / "words.jsonl")
    if all((made / name).is_file() for name in FILES):
        before = json.loads((made / "prepared.json").read_text(encoding="utf-8"))["source"]
        if before != source:
            raise ConfigError(
                f"{made} holds pairs of {before}, not of {source}: move that folder away, and start again"
            )
        return made
    if data is None:
        write(Path(source))
    prepare_data_set(ON_TOPIC, made, source=source, test_rows=HELD_OUT, longest=LONGEST)
    return made


def configured(args: argparse.Namespace, data: Path) -> TrainConfig:
    """The options for DWRL with full training, at rates that work on such pairs."""
    return TrainConfig(
        model_name_or_path=str(args.model),
        dataset_name=str(data / "train.jsonl"),
        eval_dataset_name=(Part(str(data / "test.jsonl")),),
        output_dir=str(args.output_dir),
        rollout_batch_size=16,
        minibatch_size=8,
        num_train_epochs=1,
        max_minutes=args.minutes,
        num_generations=4,
        max_completion_length=args.tokens,
        score_learning_rate=2e-5,
        thought_learning_rate=1e-5,
        optimizer_state="per_phase",
        template="brief",
        save_steps=0,
        eval_votes=0,
        seed=args.seed,
    )


def untrained(config: TrainConfig) -> Scorer:
    """The start model of `config`, with its template."""
    dialog, compute = load_dialog(config), Compute.resolve(config.dtype)
    return Scorer(load_judging(config, METHODS[config.method](config, dialog), dialog, compute))


def thoughts(rows: Sequence[Preference], each: dict[str, list[ScoredGroup]], scorer: Scorer) -> Table:
    """A table of thoughts about both responses of `rows` and their p(Yes), before and after training."""
    table = Table(title="one greedy thought, and p(Yes) after it", title_justify="left", show_lines=True)
    for heading in ("", *each):
        table.add_column(heading, ratio=1)
    for i, row in enumerate(rows):
        for k, response in enumerate(row.responses):
            said = f"{row.prompt[-1]['content']}\n{'better' if k == 0 else 'worse'}: {response}"
            cells = []
            for groups in each.values():
                sequence = groups[i].group.sequences[k][0]
                thought = scorer.dialog.tokenizer.decode(sequence.ids[sequence.thought], skip_special_tokens=True)
                cells.append(f"{math.exp(groups[i].scores[k][0]):.3f}  {thought.strip()}")
            table.add_row(*map(escape, (said, *cells)))
    return table


def main() -> None:
    """The command."""
    parser = command.parser("learning.real", __doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"), help="default models/smollm2")
    parser.add_argument(
        "--data", help="a file or data set of preferences, Anthropic/hh-rlhf:train say (default: words)"
    )
    parser.add_argument("--minutes", type=float, default=45, help="of training, without evaluation (default 45)")
    parser.add_argument("--tokens", type=int, default=32, help="of a thought at most (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="default runs/real-TIME")
    args = parser.parse_args()
    args.output_dir = args.output_dir or Path(f"runs/real-{time.strftime('%Y%m%d-%H%M%S')}")
    console = Console()
    try:
        data = pairs(args.data, Path("data"))
        config = configured(args, data)
        rows = read_preferences(data / "test.jsonl", limit=SHOWN).rows
        before = untrained(config).score_groups(rows)
        run(config, console)
        scorer = Scorer.from_pretrained(args.output_dir / "model")
        console.print(thoughts(rows, {"before": before, "after": scorer.score_groups(rows)}, scorer))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NotFetched) else 2)


if __name__ == "__main__":
    main()
