"""Prints what a run of a two-phase method with thoughts logged, as means over consecutive rollout batches.

    python -m bench.learning.signals RUN [--every 4]

RUN is the run's folder, with metrics.jsonl and thoughts/. `make real` prints the name of its own. The spreads are
standard deviations of the score in nats: of the thoughts about one response, and of the mean scores of responses. While
the former is the larger, the score says more about the thought than about the response.
"""

import json
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console

from bench import command
from dwrl_fast.training.runlog import read_metrics

FIGURES = {  # heading: the figures and their format
    "train accuracy": (("train_accuracy",), ".2f"),
    "p(Yes), better and worse": (("p_chosen", "p_rejected"), ".2f"),
    "label mass": (("label_mass",), ".2f"),
    "spread in a response, between": (("within_response", "between_responses"), ".2f"),
    "effective thoughts": (("effective_thoughts",), ".1f"),
    "mean |advantage|": (("advantage",), ".2f"),
    "gradient norms, A and B": (("grad_norm_score", "grad_norm_thought"), ".2g"),
    "clipped tokens": (("clip_fraction",), ".1%"),
    "truncated thoughts": (("truncation_rate",), ".0%"),
}


def spread(file: Path) -> dict[str, float]:
    """Of the thoughts of one rollout batch: the standard deviation of scores within a response and of the mean scores
    of responses (nats), and the effective number of thoughts, 1 / sum(w**2) with w = softmax(scores) of a response.
    """
    scores: dict[tuple[str, int], list[float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores.setdefault((row["source"], row["response"]), []).append(row["score"])
    each = torch.tensor(list(scores.values()), dtype=torch.float64)
    return {
        "within_response": each.std(1).mean().item(),
        "between_responses": each.mean(1).std().item(),
        "effective_thoughts": (1 / each.softmax(1).square().sum(1)).mean().item(),
    }


def means(run: Path, every: int) -> list[tuple[str, dict[str, float]]]:
    """Of each `every` consecutive rollout batches of a run: their numbers, and the means of their figures."""
    rows = [
        row | spread(run / "thoughts" / f"step-{row['step']:06d}.jsonl") for row in read_metrics(run / "metrics.jsonl")
    ]
    found = []
    for start in range(0, len(rows), every):
        some = rows[start : start + every]
        names = [name for figures, _ in FIGURES.values() for name in figures]
        found.append((f"{some[0]['step']} to {some[-1]['step']}", {k: mean(row[k] for row in some) for k in names}))
    return found


def main() -> None:
    """The command."""
    parser = command.parser("learning.signals", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--every", type=int, default=4, help="rollout batches in a line (default 4)")
    args = parser.parse_args()
    if args.every < 1:
        parser.error("--every: at least 1")
    try:
        found = means(args.run, args.every)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}. Name the folder of a run.")
    except KeyError as error:
        parser.error(f"{args.run}: its metrics have no {error}. Name a run of `dwrl` in two phases.")
    lines = [
        (batches, *(", ".join(format(values[name], form) for name in names) for names, form in FIGURES.values()))
        for batches, values in found
    ]
    Console().print(command.table(f"{args.run}, means", ("rollout batches", *FIGURES), lines))


if __name__ == "__main__":
    main()
