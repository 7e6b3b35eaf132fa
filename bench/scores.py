"""Compares evaluation with scores from the sampler's cache and with scores from a separate forward pass.

    python -m bench.scores --model models/smollm2 --data pairs.jsonl

The same sampler samples the same thoughts, `--votes` per response. Then p(Yes) is computed either by appending the rate
turn to the sampler's cache, or in a separate pass over prompts, responses, thoughts and rate turn. Both variants run in
every round. Thoughts have `--tokens` tokens, because no stop token is drawn. Prints medians, the ratio of each round,
and the differences of the scores.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import command
from bench.machine import machine
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.methods import METHODS
from dwrl_fast.sampling import RatingSampler, Sampler, TreeSampler
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.scoring.runtime import Runtime
from dwrl_fast.scoring.yes_no import GenerativeJudging
from dwrl_fast.training.policy import load_judging

ASKED = 1.3  # target speed-up, at the lengths of hh pairs with 4 votes


class Unrated:
    """`sampler` without its ability to rate."""

    def __init__(self, sampler: Sampler):
        self.float32, self.sample = sampler.float32, sampler.sample


def measured(rows: list[Preference], judging: GenerativeJudging, votes: int, rounds: int) -> dict[str, Any]:
    """The seconds of each round with and without scores from the cache, and the largest difference of a score."""
    runtime = judging.runtime
    assert isinstance(runtime.sampler, RatingSampler)
    plain = Runtime(runtime.model, runtime.dialog, runtime.compute, runtime.layout, Unrated(runtime.sampler))
    ways = {"from the cache": judging, "by a pass": GenerativeJudging(plain, judging.card)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):  # the first is not counted
        for name, way in ways.items():
            start = time.perf_counter()
            found = way.score_groups(rows, votes=votes)
            if round_:
                seconds[name].append(time.perf_counter() - start)
            scores[name] = [score for each in found for some in each.scores for score in some]
    a, b = scores.values()
    return {"seconds": seconds, "apart": max(abs(x - y) for x, y in zip(a, b, strict=True))}


def main() -> None:
    """The command: measure, and print."""
    parser = command.parser("scores", __doc__)
    parser.add_argument("--model", default="models/smollm2", help="a causal language model (default models/smollm2)")
    parser.add_argument("--data", required=True, help="a file of preference pairs")
    parser.add_argument("--pairs", type=int, default=16, help="number of pairs to use (default 16)")
    parser.add_argument("--votes", type=int, default=4, help="thoughts about a response (default 4)")
    parser.add_argument("--tokens", type=int, default=64, help="length of every thought (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are taken over them (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    config = TrainConfig(
        model_name_or_path=args.model, dataset_name=args.data, dtype="fp32", max_completion_length=args.tokens
    )
    dialog = load_dialog(config)
    judging = load_judging(config, METHODS["dwrl"](config, dialog), dialog, Compute.resolve("fp32"))
    assert isinstance(judging, GenerativeJudging) and isinstance(judging.runtime.sampler, TreeSampler)
    judging.runtime.sampler.stop_ids = frozenset()
    rows = read_preferences(args.data, limit=args.pairs).rows
    found = measured(rows, judging, args.votes, args.rounds)
    cache, whole = found["seconds"].values()
    ratios = [b / a for a, b in zip(cache, whole, strict=True)]
    console = Console()
    for name, some in found["seconds"].items():
        console.print(f"scores {name}: {statistics.median(some):.1f} s")
    console.print(
        f"ratio {statistics.median(ratios):.2f} (asked {ASKED}), rounds {', '.join(f'{r:.2f}' for r in ratios)}; "
        f"scores differ by at most {found['apart']:.0e} nats"
    )
    plain = {"data": Path(args.data).name, "json": None}
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **vars(args), **plain, **found}, indent=1))


if __name__ == "__main__":
    main()
