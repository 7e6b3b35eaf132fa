"""Measures how much a thought, its log-probs and its score depend on the batch in which they are computed.

    python -m bench.training.batch_sizes --model models/smollm2 --data pairs.jsonl

One thought about each response of some pairs is sampled in batches of 1, 7 and 64 sequences, in float32. The random
draws are the same (`request_key`), but products with different batch sizes round differently. Prints the share of
thoughts that differ from those in batches of 64; and, for the thoughts of these batches, the largest difference in a
log-prob and in a score, log p(Yes), between micro-batches of one pair and of as many pairs as fit.
"""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import command
from bench.machine import machine
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.encode import Group, closed_groups, response_requests
from dwrl_fast.methods import METHODS
from dwrl_fast.sampling import Limits, TreeSampler
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.scoring.yes_no import GenerativeJudging
from dwrl_fast.training.policy import load_judging

SIZES = (64, 7, 1)
BOUND = 1e-5  # target for log-probs and scores


def measured(rows: list[Preference], judging: GenerativeJudging, tokens: int, seed: int) -> dict[str, Any]:
    """The printed figures by name: the share for each batch size, and both largest differences."""
    requests = response_requests(rows, judging.dialog)
    contexts = [context.ids for request in requests for context in request.contexts]
    sampler = judging.runtime.sampler
    assert isinstance(sampler, TreeSampler)
    thoughts = {}
    for size in SIZES:
        sampler.limits = Limits(size, 4.0)
        thoughts[size] = sampler.sample(contexts, 1, max_tokens=tokens, temperature=1.0, seed=seed)
    first = thoughts[SIZES[0]]
    differing = {
        size: sum(a.ids != b.ids for (a,), (b,) in zip(first, found, strict=True)) for size, found in thoughts.items()
    }
    groups = closed_groups(requests, first, judging.dialog)
    together, alone = read(groups, judging), [read([group], judging) for group in groups]
    logprobs, scores = zip(together, map(torch.cat, zip(*alone, strict=True)), strict=True)
    return {
        "thoughts": len(contexts),
        "differing": differing,
        "logprob": float((logprobs[0] - logprobs[1]).abs().max()),
        "score": float((scores[0] - scores[1]).abs().max()),
    }


def read(groups: list[Group], judging: GenerativeJudging) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probs of all thought tokens, and all scores, for groups computed together."""
    logprobs = [x for group in judging.runtime.logprobs(groups) for some in group for one in some for x in one]
    scores = judging.runtime.run_batches(groups, judging._scores)
    return torch.tensor(logprobs), torch.tensor([x for group in scores for some in group for x in some])


def main() -> None:
    """The command: sample and score, and print the differences."""
    parser = command.parser("training.batch_sizes", __doc__)
    parser.add_argument("--model", default="models/smollm2", help="a causal language model (default models/smollm2)")
    parser.add_argument("--data", required=True, help="a file of preference pairs")
    parser.add_argument("--pairs", type=int, default=32, help="number of pairs to use (default 32)")
    parser.add_argument("--tokens", type=int, default=32, help="maximum length of a thought (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    config = TrainConfig(model_name_or_path=args.model, dataset_name=args.data, dtype="fp32")
    dialog = load_dialog(config)
    judging = load_judging(config, METHODS["dwrl"](config, dialog), dialog, Compute.resolve("fp32"))
    assert isinstance(judging, GenerativeJudging)
    rows = read_preferences(args.data, limit=args.pairs).rows
    found = measured(rows, judging, args.tokens, args.seed)
    console = Console()
    for size, count in list(found["differing"].items())[1:]:
        share = f"{count} of {found['thoughts']} ({count / found['thoughts']:.2%}, expected under 1 %)"
        console.print(f"batches of {size}: {share} thoughts differ from those of batches of {SIZES[0]}")
    for what in ("logprob", "score"):
        console.print(f"largest difference of a {what} between micro-batches: {found[what]:.1e} (asked {BOUND:.0e})")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **found}, indent=1))


if __name__ == "__main__":
    main()
