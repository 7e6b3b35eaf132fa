"""Simulates a DWRL run on 8 to 1,024 ranks, step by step. Nothing is trained, and no GPU is needed.

    python -m bench.scale

Rollout batches are drawn from groups with the lengths of hh, rmb and ultrafeedback; the lengths of thoughts are
distributed like those of sampled ones. The trainer's balancer divides each minibatch, and the sampler's own split
divides the contexts. The time of a rank's share is predicted like in `dwrl_fast.plan`, with the rates of a published
profile. So the shares of idle time come from the code, and the seconds from the profile. A minibatch is an eighth of
its rollout batch, as in the paper.

For each step: `sampling` and `updates` (including the old policy's log-probs) are a rank's average computation;
`thoughts` is the wait for the rank with the longest sampling; `stragglers` is the wait for the most costly share of a
minibatch; `gathers` is the communication of weights and gradients that computation does not hide; `sync` is the update
of whole copies. A size stops scaling when twice the ranks are less than 1.5 times as fast. Its limit is the part that
is furthest from being halved. For sampling this happens because the longest thought, which is sampled token by token,
takes as long on more ranks.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from bench import command
from bench.machine import machine
from bench.scaling import qwen_7b
from bench.training import lengths
from dwrl_fast.batching.balance import balanced
from dwrl_fast.batching.tree import tree_sizes
from dwrl_fast.plan import Setup, load_profile, parse_plan, planned
from dwrl_fast.plan.seconds import Clock
from dwrl_fast.plan.trace import Traced, trace

MODEL = Path(__file__).parents[1] / "recipes" / "models" / "qwen2.5-7b.json"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROLLOUTS = (256, 1024, 4096, 16384)
DATA = ("hh", "rmb", "ultrafeedback")
MINIBATCHES = 8  # minibatches per rollout batch
ENOUGH = 1.5  # required speed-up on twice the ranks
VOCABULARY = 152_064
PARTS = ("sampling", "thoughts", "updates", "stragglers", "gathers", "sync")


class Pool(NamedTuple):
    """Groups to draw from, one entry per group: tokens and attention pairs of the tree, rows of the head, cost, tokens
    of the contexts with shared prefixes counted once, tokens of the longest context; and tokens of each thought,
    [groups, thoughts].
    """

    tokens: np.ndarray
    pairs: np.ndarray
    rows: np.ndarray
    costs: np.ndarray
    contexts: np.ndarray
    longest: np.ndarray
    thoughts: np.ndarray


def pool(data: str, count: int, mean: int, most: int) -> Pool:
    """`count` groups with the lengths of `data`, and thoughts of `mean` tokens on average, cut at `most`."""
    found = lengths.pairs(data, count)
    written = [min(size, most) for size in lengths.thought_lengths(mean, 2 * count * lengths.THOUGHTS)]
    groups = lengths.groups(found, written, VOCABULARY)
    tokens, pairs = zip(*tree_sizes(groups), strict=True)
    thoughts = np.array([[len(one.ids) for some in group.thoughts for one in some] for group in groups])
    own = [(len(a.ids), len(b.ids), a.prompt.stop) for a, b in found.contexts]
    return Pool(
        np.array(tokens),
        np.array(pairs),
        thoughts.sum(1),
        np.array(qwen_7b().of(groups, tokens, pairs)),
        np.array([a + b - prompt for a, b, prompt in own]),
        np.array([max(a, b) for a, b, _ in own]),
        thoughts,
    )


def step(setup: Setup, traced: Traced, found: Pool, ranks: int, rollout: int, seed: int) -> dict[str, float]:
    """The seconds of one step by part."""
    drawn = np.random.default_rng(seed).integers(len(found.tokens), size=rollout)
    clock = Clock(setup, traced, ranks, ranks)
    writing = _sampling(clock, found, drawn, ranks)
    phases, drawn = len(setup.method.phases), drawn[: rollout // MINIBATCHES]
    places = balanced(found.costs[drawn].tolist(), ranks)
    both = _passes(clock, found, drawn, places, gradients=True)
    old = _passes(clock, found, drawn, places, gradients=False)  # log-probs of the old policy
    mean, most, exposed = (MINIBATCHES * (phases * one + other) for one, other in zip(both, old, strict=True))
    return {
        "sampling": writing.mean(),
        "thoughts": writing.max() - writing.mean(),
        "updates": mean + MINIBATCHES * phases * clock.optimizer(),
        "stragglers": most - mean,
        "gathers": exposed,
        "sync": clock.sync(),
    }


def _sampling(clock: Clock, found: Pool, drawn: np.ndarray, ranks: int) -> np.ndarray:
    """[ranks], seconds of sampling. The contexts are divided as in `SplitSampler`: contiguous, with about equal
    tokens.
    """
    most = clock.setup.config.max_completion_length
    sizes = found.contexts[drawn] + found.thoughts.shape[1] * most
    middle = np.cumsum(sizes) - sizes / 2
    edges = np.searchsorted(middle, sizes.sum() * np.arange(ranks + 1) / ranks)
    seconds = []
    for first, last in itertools.pairwise(edges):
        own = drawn[first:last]
        if len(own) == 0:
            seconds.append(0.0)
            continue
        thoughts, tokens = found.thoughts[own].ravel(), found.contexts[own].sum()
        beside = clock.beside(len(thoughts), tokens)
        passes = max(thoughts.max(), thoughts.sum() / beside)  # a free slot is filled at once
        seen = found.longest[own].mean() / clock.setup.config.num_generations + thoughts.mean() / 2
        seconds.append(
            clock.prefill(tokens, found.longest[own].max()) + passes * clock.token(thoughts.sum() / passes, seen)
        )
    return np.array(seconds)


def _passes(
    clock: Clock, found: Pool, drawn: np.ndarray, places: list[list[int]], *, gradients: bool
) -> tuple[float, float, float]:
    """A pass over a minibatch divided as `places`, with or without a backward pass: the average and the maximum seconds
    of computation per rank, and the seconds of collectives that are not hidden.
    """
    config = clock.setup.config
    directions = (True, False) if gradients else (True,)
    times = 12 + 4 * config.gradient_checkpointing if gradients else 4
    seconds, micro = [], 1
    for own in places:
        some = drawn[own]
        tokens = found.tokens[some].sum()
        count = max(1, -(-int(tokens) // config.token_budget))  # groups are not split, so one more may be needed
        micro = max(micro, count)
        layers = sum(count * clock.work(forward, tokens / count) for forward in directions) if len(own) else 0.0
        # One of the two phases trains the rows; old log-probs need one product of them.
        head = clock.head(found.rows[some].sum(), 3) / 2 if gradients else clock.head(found.rows[some].sum(), 1)
        seconds.append(layers + clock.attention(found.pairs[some].sum(), times) + head)
    most = max(seconds)
    return float(np.mean(seconds)), most, clock.together(most, micro, gradients=gradients) - most


def stops(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For one size over growing numbers of ranks: the largest number up to which doubling is still `ENOUGH` times as
    fast, and the part that is then furthest from being halved.
    """
    for one, other in itertools.pairwise(rows):
        if one["seconds"] / other["seconds"] < ENOUGH:
            lost = {part: other[part] - one[part] / 2 for part in PARTS}
            return {"scales_to": one["ranks"], "limited_by": max(PARTS, key=lost.__getitem__)}
    return {"scales_to": rows[-1]["ranks"], "limited_by": "-"}


def main() -> None:
    """The command."""
    parser = command.parser("scale", __doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--profile", default="h100", help="a published device, or a file of doctor --profile")
    parser.add_argument("--tokens", type=int, default=300, help="of a thought on average (default 300)")
    parser.add_argument("--groups", type=int, default=400, help="of each data set that are drawn from (default 400)")
    parser.add_argument("--steps", type=int, default=3, help="that are drawn of each size (default 3)")
    parser.add_argument("--most", type=int, default=RANKS[-1], help="ranks (default 1024)")
    parser.add_argument("--quick", action="store_true", help="hh, 40 groups, one step, 64 ranks")
    parser.add_argument("--json", type=Path, help="write machine, versions, commit and figures to this file")
    report(parser.parse_args(), Console(width=130))


def report(args: argparse.Namespace, console: Console) -> None:
    """Simulate, print and write."""
    if args.quick:
        args.data, args.groups, args.steps, args.most = ["hh"], 40, 1, 64
    config = parse_plan(["--model_config", str(MODEL), "--gradient_checkpointing"])
    setup = planned(config, config.lengths, load_profile(args.profile))
    traced = trace(setup, 1)
    cases: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    for data in args.data:
        found = pool(data, args.groups, args.tokens, config.max_completion_length)
        for rollout in ROLLOUTS:
            rows = []
            for ranks in (each for each in RANKS if each <= args.most):
                taken = [step(setup, traced, found, ranks, rollout, seed) for seed in range(args.steps)]
                mean = {name: float(np.mean([each[name] for each in taken])) for name in taken[0]}
                row: dict[str, Any] = {"data": data, "rollout": rollout, "ranks": ranks, "seconds": sum(mean.values())}
                idle = (mean["thoughts"] + mean["stragglers"]) / row["seconds"]
                rows.append(row | mean | {"idle": idle})
            cases += rows
            limits.append({"data": data, "rollout": rollout} | stops(rows))
    show(cases, limits, setup, console)
    if args.json:
        content = {"benchmark": "scale", "machine": machine(), "profile": setup.profile.name, "cases": cases}
        args.json.write_text(json.dumps(content | {"limits": limits}, indent=1) + "\n")


def show(cases: list[dict[str, Any]], limits: list[dict[str, Any]], setup: Setup, console: Console) -> None:
    """Print tables of every case, and of the limit of each size."""
    heads = ("lengths", "rollout batch", "ranks", "step, s", "idle", *PARTS)
    lines = [
        (
            *(
                each["data"],
                f"{each['rollout']:,}",
                f"{each['ranks']:,}",
                f"{each['seconds']:.3g}",
                f"{each['idle']:.0%}",
            ),
            *(f"{each[name] / each['seconds']:.0%}" for name in PARTS),
        )
        for each in cases
    ]
    title = f"{setup.shape.name}, simulated at the rates of {setup.profile.name}; shares of a step"
    console.print(command.table(title, heads, lines))
    ends = [(each["data"], f"{each['rollout']:,}", f"{each['scales_to']:,}", each["limited_by"]) for each in limits]
    console.print(
        command.table(
            f"Twice the ranks at least {ENOUGH} times as fast",
            ("lengths", "rollout batch", "scales to, ranks", "limited by"),
            ends,
        )
    )


if __name__ == "__main__":
    main()
