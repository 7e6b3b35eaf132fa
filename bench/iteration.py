"""Compares a whole iteration (sampling and updates) of DWRL with one of TRL's GRPO.

    python -m bench.iteration --quick

dwrl_fast: thoughts are sampled, the old log-probs are the sampler's (the default in float32), a minibatch is laid out,
and phases A and B each run forward, backward and an AdamW step; `plain loop` samples without a shared cache. TRL:
GRPOTrainer's own `training_step`s, which generate, score with a trivial reward, and run forward and backward once; then
clipping and an AdamW step. It generates at the beginning of an update, so it also needs no old log-probs. Its
micro-batch size, and whether it generates per micro-batch or once, are the fastest of a sweep.

Weights, pairs and lengths are the same: pairs with the lengths of hh and of rmb (bench/training/lengths.py), sorted by
length, 4 thoughts per response, all with --tokens tokens (the stop token is an id that no model writes). Learning rates
are almost 0, so that all rounds compute the same. The model is in the folder --model; with --quick it is a small one
with random weights. Each round runs all variants; a ratio is computed per round and reported as median (least to most).
Finally the rate of our two updates in model FLOPs (bench/training/flops.py) is compared with that of bare products of
the same weights.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from bench import command
from bench.harness import timed
from bench.machine import machine
from bench.rounds import in_turn, ratio
from bench.sampling.counts import rates
from bench.sampling.engines import DRAWN, Work, default_limits, generation_trainer, plain_sampler, tree_sampler
from bench.training import lengths
from bench.training.plain_update import LOGITS_HELD, free_memory
from bench.training.trl_update import trl_missing
from bench.training.update import Way, fastest, loaded, phase_flops, powers
from dwrl_fast.sampling import Sampler
from dwrl_fast.scoring import Runtime
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.policy import Policy
from dwrl_fast.training.rollout import Rollout

TRL_HELD = 3  # times the logits of a plain update: it also holds entropies and masks of every position
RATE = 1e-12  # learning rate
ASKED = {"hh": 2.5, "rmb": 4.0}


class Stages:
    """The seconds of each stage since `begin`, without the time of nested stages."""

    def __init__(self) -> None:
        self.inner: list[float] = []
        self.begin()

    def begin(self) -> None:
        """Reset all times."""
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.inner.append(0.0)
        yield
        taken = time.perf_counter() - start
        self.seconds[name] += taken - self.inner.pop()
        if self.inner:
            self.inner[-1] += taken

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as a stage."""

        def staged(*args: Any, **options: Any) -> Any:
            with self(name):
                return function(*args, **options)

        return staged

    def shares(self) -> dict[str, float]:
        """The shares of the total time."""
        total = sum(self.seconds.values())
        return {name: seconds / total for name, seconds in self.seconds.items()}


class Iteration(NamedTuple):
    """One variant of the iteration."""

    note: str
    run: Callable[[], object]
    stages: Stages
    updates: dict[str, float]  # model GFLOPs of both phases in the last run; empty for peers

    def seconds(self) -> float:
        """The seconds of one run."""
        return timed(self.run)


def work_of(pairs: lengths.Pairs, tokens: int, vocabulary: int) -> Work:
    """The sampling work for the contexts of `pairs`."""
    contexts = [[i % vocabulary for i in context.ids] for both in pairs.contexts for context in both]
    return Work(contexts, lengths.THOUGHTS, tokens)


def ours(policy: Policy, rollout: Rollout, pairs: lengths.Pairs, tokens: int, sampler: Sampler, note: str) -> Iteration:
    """An iteration with the components of the trainer, in its order."""
    method, stages, updates = rollout.method, Stages(), dict[str, float]()
    vocabulary = policy.model.lm.config.vocab_size
    work = work_of(pairs, tokens, vocabulary)

    def run() -> None:
        with stages("sampling"):
            thoughts = sampler.sample(work.contexts, work.n, max_tokens=tokens, temperature=1.0, seed=0)
        work.check([len(thought.ids) for some in thoughts for thought in some])
        with stages("laying out"):
            groups = lengths.closed(pairs, thoughts, vocabulary)
        if not sampler.float32:
            with stages("old log-probs"):
                groups, _ = rollout.recomputed(groups)
        with stages("laying out"):
            (minibatch,) = policy.pack(groups, len(groups))
        for phase in method.phases:
            with stages(f"phase {phase}"):
                policy.update(phase, minibatch, method.loss, 0)
        policy.read_metrics(groups)
        counted = phase_flops(policy.model.lm, minibatch.batches)
        updates["model GFLOP"] = len(method.phases) * counted["model GFLOP"]

    return Iteration(note, run, stages, updates)


def grpo(runtime: Runtime, pairs: lengths.Pairs, tokens: int) -> Iteration:
    """An iteration of GRPOTrainer with its fastest settings."""
    stages = Stages()
    work = work_of(pairs, tokens, runtime.model.lm.config.vocab_size)
    trainer = generation_trainer(runtime, work.n, tokens, learning_rate=RATE)
    trainer.create_optimizer()
    # TRL's prompts are texts, but ours are ids, so the text of a prompt is the index of its ids. Everything else is
    # unchanged.
    trainer._tokenize_prompts = lambda prompts: ([work.contexts[int(prompt)] for prompt in prompts], None, {})
    trainer._generate_single_turn = stages.wrap("sampling", trainer._generate_single_turn)
    trainer._generate_and_score_completions = stages.wrap("laying out", trainer._generate_and_score_completions)
    logprobs = trainer._get_per_token_logps_and_entropies
    staged = stages.wrap("old log-probs", logprobs)
    trainer._get_per_token_logps_and_entropies = lambda *args, **options: (
        logprobs if torch.is_grad_enabled() else staged
    )(*args, **options)
    rows = [{"prompt": str(i)} for i in range(len(work.contexts)) for _ in range(work.n)]

    def run(size: int, at_once: int) -> None:
        metrics, accumulated = trainer._metrics["train"], len(rows) // size
        trainer.args.per_device_train_batch_size, trainer.args.steps_per_generation = size, at_once
        trainer.args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = accumulated
        trainer._step, trainer._buffered_inputs = 0, None
        metrics.clear()
        for step in range(accumulated):
            first = step // at_once * at_once * size  # a generation batch is passed again for each of its steps
            with stages("update"):
                trainer.training_step(trainer.model, rows[first : first + at_once * size], None)
        with stages("update"):
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.model.zero_grad(set_to_none=True)
        work.check([int(min(metrics["completions/min_length"]))] * len(rows))

    longest = max(map(len, work.contexts)) + tokens
    held = LOGITS_HELD * longest * runtime.model.lm.config.vocab_size * 4  # bytes for the logits of one thought

    def ladder(together: bool) -> Iterator[Way]:
        for size in powers(work.n, len(rows)):
            if len(rows) % size == 0 and (size == work.n or TRL_HELD * size * held < free_memory()):
                at_once = len(rows) // size if together else 1
                note = f"micro-batches of {size} thoughts, {at_once * size} generated at once"
                yield Way(note, partial(run, size, at_once), {})

    best = fastest(ladder(True), ladder(False))
    assert best is not None
    stages.begin()
    return Iteration(best.note, best.run, stages, {})


def measured(data: str, policy: Policy, rollout: Rollout, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure and print one data set. Returns its entry for `--json`."""
    runtime = policy.runtime
    pairs, size = lengths.pairs(data, args.pairs), default_limits(runtime).batch_size
    samplers: dict[str, Sampler] = {"ours": tree_sampler(runtime), "plain loop": plain_sampler(runtime, size)}
    ways = {
        name: ours(policy, rollout, pairs, args.tokens, sampler, type(sampler).__name__)
        for name, sampler in samplers.items()
    }
    if args.alone:
        console.print(f"{data}: ours alone, as asked")
    elif trl_missing():
        console.print(f"{data}: no trl: {trl_missing()}")
    else:
        ways["trl"] = grpo(runtime, pairs, args.tokens)
    for way in ways.values():
        way.seconds()  # unmeasured
        way.stages.begin()
    taken = in_turn({name: way.seconds for name, way in ways.items()}, args.rounds, args.seconds)
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        row = {"variant": name, "note": way.note, "seconds": taken[name], "shares": way.stages.shares()}
        rows.append(row | {"ours_times_as_fast": ratio(taken[name], taken["ours"])})
    lines = [
        (
            f"{row['variant']}\n[dim]{row['note']}[/]",
            f"{statistics.median(row['seconds']):.2f}",
            str(row["ours_times_as_fast"]),
            ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items()),
        )
        for row in rows
    ]
    title = f"{data}: one iteration over {pairs.source}, thoughts of {args.tokens} tokens"
    console.print(command.table(title, ("variant", "seconds", "in times of ours", "shares"), lines))
    if "trl" in ways and not args.quick:
        found = ratio(taken["trl"], taken["ours"])
        console.print(f"{data}: ours {found} times as fast as trl; asked {ASKED[data]}")
    updates = rate_of_updates(ways["ours"], len(taken["ours"]), runtime)
    console.print(
        f"{data}: our updates, {updates['model GFLOP']:,.0f} model GFLOP in {updates['seconds']:.2f} s, run at "
        f"{updates['share']:.0%} of the {updates['GFLOP/s of products']:.0f} GFLOP/s of bare products"
    )
    return {"case": data, "source": pairs.source, "rows": rows, "updates": updates}


def rate_of_updates(way: Iteration, rounds: int, runtime: Runtime) -> dict[str, float]:
    """The model GFLOPs and seconds of the updates in a round, and their rate relative to bare products, measured
    now.
    """
    seconds = sum(taken for name, taken in way.stages.seconds.items() if name.startswith("phase")) / rounds
    products = rates(runtime.model.lm, default_limits(runtime).batch_size).prefill / 1e9
    share = way.updates["model GFLOP"] / seconds / products
    return way.updates | {"seconds": seconds, "GFLOP/s of products": products, "share": share}


def main() -> None:
    """The command: all data sets in turn."""
    parser = command.parser("iteration", __doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"), help="default models/smollm2")
    parser.add_argument("--data", nargs="+", default=list(ASKED), choices=list(ASKED), help="default: both")
    parser.add_argument("--pairs", type=int, default=4, help="in one minibatch (default 4)")
    parser.add_argument("--tokens", type=int, default=64, help="of each thought (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="over all variants (default 5)")
    parser.add_argument("--seconds", type=float, default=3600, help="no further round after this long in a case")
    parser.add_argument("--alone", action="store_true", help="leave TRL out")
    parser.add_argument("--quick", action="store_true", help="a drawn model, 2 pairs, 16 tokens, 3 rounds")
    parser.add_argument("--json", type=Path, help="write machine, versions, commit and figures to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.pairs, args.tokens, args.rounds = 2, 16, 3
    console = Console(width=170)
    if not (args.quick or args.model.is_dir()):
        raise SystemExit(f"{args.model} is not here; `make smollm2` fetches it")
    policy, rollout = trained(DRAWN if args.quick else args.model)
    reports = [measured(data, policy, rollout, args, console) for data in args.data]
    if args.json:
        args.json.write_text(json.dumps({"benchmark": "iteration", "machine": machine(), "cases": reports}, indent=1))


def trained(source: Any) -> tuple[Policy, Rollout]:
    """A policy for training a model with DWRL (from a folder or a shape), and its rollout."""
    method, judging = loaded(source, learning_rate=RATE, score_learning_rate=RATE, thought_learning_rate=RATE)
    model = judging.runtime.model.train()
    optimizers = Optimizers(model, method, method.config, total=1)
    return Policy(judging.runtime, optimizers), Rollout(method, judging)


if __name__ == "__main__":
    main()
