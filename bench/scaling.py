"""Compares one DWRL update (phases A and B with optimizer steps) in one process and on two ranks.

    python -m bench.scaling

The ranks are processes of this machine with one thread each, connected over loopback (gloo), with the same minibatch
and weights. Rounds run both variants; while the single process computes, the other rank waits. Efficiency is the time
of one process divided by (ranks times their time). A rank's own work is the computation of its thread; idle is the wait
for the rank with the most work; the rest is collectives. If cores share resources, this is included in the efficiency.

Then, without running anything: how evenly groups with the lengths of hh and of rmb are divided over 8 ranks, with the
costs of Qwen2.5-7B. It prints the most costly rank relative to the mean, over draws of a minibatch, and the same for
round-robin distribution.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from bench import command
from bench.machine import machine
from bench.processes import together
from bench.training import lengths
from bench.training.step import MODELS, QWEN_7B
from bench.training.update import loaded
from dwrl_fast.batching.balance import Cost, balanced
from dwrl_fast.batching.tree import tree_sizes
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.policy import Minibatch, Policy
from dwrl_fast.training.rollout import Rollout

RATE = 1e-9  # so small that all rounds compute the same
RANKS, SIMULATED = 2, 8
MINIBATCHES = (32, 64, 128, 256)
ASKED = 1.05  # target for the most costly rank, relative to the mean


class Trained(NamedTuple):
    """A policy with a minibatch for its updates."""

    policy: Policy
    method: Any
    minibatch: Minibatch

    def update(self) -> tuple[float, float]:
        """The seconds of both phases, and the seconds that this process's thread computed."""
        start, own = time.perf_counter(), time.thread_time()
        for phase in self.method.phases:
            self.policy.update(phase, self.minibatch, self.method.loss, 0)
        return time.perf_counter() - start, time.thread_time() - own


def trained(ranks: Ranks, model: str, data: str, pairs: int, tokens: int, budget: int) -> Trained:
    """A model with random weights, and `pairs` pairs with the lengths of `data` and thoughts of `tokens` tokens on
    average.
    """
    shape = MODELS[model]
    rates = dict.fromkeys(("learning_rate", "score_learning_rate", "thought_learning_rate"), RATE)
    method, judging = loaded(shape, ranks=ranks, token_budget=budget, **rates)
    policy = Policy(judging.runtime, Optimizers(judging.runtime.model.train(), method, method.config, total=1))
    thoughts = lengths.thought_lengths(tokens, 2 * pairs * lengths.THOUGHTS)
    groups = lengths.groups(lengths.pairs(data, pairs), thoughts, shape["vocab_size"])
    (minibatch,) = policy.pack(Rollout(method, judging).recomputed(groups)[0], pairs)
    return Trained(policy, method, minibatch)


def rounds(ranks: Ranks, count: int, *case: Any) -> dict[str, list[Any]]:
    """For each round: the seconds of the single process, and the seconds and own work of every rank."""
    shared = trained(ranks, *case)
    alone = trained(ALONE, *case) if ranks.first else None
    found: dict[str, list[Any]] = {"alone": [], "shared": []}
    for round_ in range(count + 1):  # the first round is not counted
        taken = alone.update() if alone is not None else None
        ranks.gather(None)
        each = ranks.gather(shared.update())
        if round_:
            found["alone"].append(taken)
            found["shared"].append(each)
    return found


def summary(found: dict[str, list[Any]]) -> dict[str, float]:
    """Medians over the rounds; shares are relative to the ranks' time."""
    ratios, collectives, idle = [], [], []
    for (one, _), each in zip(found["alone"], found["shared"], strict=True):
        wall, most = max(seconds for seconds, _ in each), max(own for _, own in each)
        ratios.append(one / (len(each) * wall))
        collectives.append((wall - most) / wall)
        idle.append(statistics.mean(most - own for _, own in each) / wall)
    return {
        "alone_seconds": statistics.median(one for one, _ in found["alone"]),
        "seconds": statistics.median(max(seconds for seconds, _ in each) for each in found["shared"]),
        "efficiency": statistics.median(ratios),
        "collectives": statistics.median(collectives),
        "idle": statistics.median(idle),
    }


def qwen_7b() -> Cost:
    """The costs of the parts of a pass through Qwen2.5-7B."""
    hidden, inner, layers = QWEN_7B["hidden_size"], QWEN_7B["intermediate_size"], 28
    narrow = hidden * QWEN_7B["num_key_value_heads"] // QWEN_7B["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner
    return Cost(layers * layer, hidden * QWEN_7B["vocab_size"], 2 * layers * hidden)


def balance(data: str, pairs: int, tokens: int, draws: int) -> list[dict[str, Any]]:
    """For each minibatch size, the most costly of `SIMULATED` ranks relative to the mean: median and maximum over
    draws.
    """
    thoughts = lengths.thought_lengths(tokens, 2 * pairs * lengths.THOUGHTS)
    groups = lengths.groups(lengths.pairs(data, pairs), thoughts, QWEN_7B["vocab_size"])
    sizes = tree_sizes(groups)
    costs = qwen_7b().of(groups, [size for size, _ in sizes], [pair for _, pair in sizes])
    rng, found = np.random.default_rng(0), []
    for size in MINIBATCHES:
        ours, dealt = [], []
        for _ in range(draws):
            drawn = [costs[i] for i in rng.choice(pairs, size, replace=size > pairs)]
            ours.append(uneven(drawn, balanced(drawn, SIMULATED)))
            dealt.append(uneven(drawn, [list(range(rank, size, SIMULATED)) for rank in range(SIMULATED)]))
        row = {"data": data, "minibatch": size, "median": statistics.median(ours), "most": max(ours)}
        found.append(row | {"dealt_out": statistics.median(dealt)})
    return found


def uneven(costs: list[int], places: list[list[int]]) -> float:
    """The largest share relative to the mean."""
    loads = [sum(costs[i] for i in own) for own in places]
    return max(loads) * len(loads) / sum(loads)


def main() -> None:
    """The command."""
    parser = command.parser("scaling", __doc__)
    parser.add_argument("--model", default="trunk-heavy", choices=list(MODELS), help="drawn (default trunk-heavy)")
    parser.add_argument("--pairs", type=int, default=4, help="in the minibatch (default 4)")
    parser.add_argument("--data", nargs="+", default=["hh", "rmb"], help="whose lengths are timed (default: hh rmb)")
    parser.add_argument("--tokens", type=int, default=40, help="of a thought on average (default 40)")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch (default 4096)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=100, help="of minibatches to share (default 100)")
    parser.add_argument("--quick", action="store_true", help="2 pairs, 1 round, 10 draws")
    parser.add_argument("--json", type=Path, help="write machine, versions, commit and figures to this file")
    report(parser.parse_args(), Console(width=120))


def report(args: argparse.Namespace, console: Console) -> None:
    """Measure, print and write."""
    if args.quick:
        args.pairs, args.rounds, args.draws = 2, 1, 10
    cases = {}
    for data in args.data:
        with tempfile.TemporaryDirectory() as folder:
            case = (args.model, data, args.pairs, args.tokens, args.budget)
            cases[data] = summary(together(Path(folder), RANKS, rounds, args.rounds, *case, seconds=3600)[0])
    heads = ("lengths", "one process, s", f"{RANKS} ranks, s", "efficiency", "collectives", "idle")
    lines = [
        (
            *(data, f"{x['alone_seconds']:.2f}", f"{x['seconds']:.2f}"),
            *(f"{x[name]:.0%}" for name in ("efficiency", "collectives", "idle")),
        )
        for data, x in cases.items()
    ]
    console.print(command.table(f"An update of {args.pairs} pairs, {args.model}, one thread a rank", heads, lines))
    shared = [row for data in ("hh", "rmb") for row in balance(data, 40 if args.quick else 400, 200, args.draws)]
    shares = [
        (row["data"], str(row["minibatch"]), f"{row['median']:.4f}", f"{row['most']:.4f}", f"{row['dealt_out']:.3f}")
        for row in shared
    ]
    columns = ("lengths", "groups", "most costly rank / mean", "at most", "dealt out in turn")
    console.print(command.table(f"Groups shared by {SIMULATED} ranks (simulated); asked {ASKED}", columns, shares))
    if args.json:
        found = {"benchmark": "scaling", "machine": machine(), "update": cases, "balance": shared}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
