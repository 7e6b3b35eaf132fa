"""Sampling of thoughts on a GPU: with a shared cache, with and without CUDA graphs, and with the plain loop.

    python -m bench.gpu.sampling --json FILE

Each variant samples 4 thoughts of 128 tokens for 64 contexts of about 350 tokens (32 pairs), in bfloat16 with float32
weights. Models have the shapes of SmolLM2-135M and Qwen2.5-3B and random weights. All thoughts have the full length,
because the stop token is an id that no model writes. Every round runs all variants; a ratio is computed per round and
reported as median (least to most).

The lower bound counts, for each pass, the weights and cache blocks that are read in bfloat16, at the rate of a copy on
this GPU, and the products of the prefill at the rate of a large product. Casting weights to bfloat16, once per call,
and everything else are not included.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import command
from bench.machine import ceilings, machine
from bench.rounds import in_turn, ratio
from bench.sampling.counts import cached_bytes, tree_counts
from bench.sampling.engines import Work, default_limits, of_sampler, plain_sampler, tree_sampler
from bench.sampling.texts import drawn
from bench.training.flops import head_flops, trunk_flops
from bench.training.update import loaded
from dwrl_fast.sampling import forward
from dwrl_fast.scoring import Runtime

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen2.5-3b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
N, BF16 = 4, 2


def without_graphs(run: Callable[[], float]) -> Callable[[], float]:
    """`run` without CUDA graphs."""

    def launched() -> float:
        most, forward.GRAPHED = forward.GRAPHED, -1
        try:
            return run()
        finally:
            forward.GRAPHED = most

    return launched


def measured(name: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure one shape and print its table. Returns its entry for `--json`."""
    _, judging = loaded(SHAPES[name])
    runtime = judging.runtime
    contexts = drawn("long", args.pairs).folded(SHAPES[name]["vocab_size"]).contexts
    work = Work(contexts, N, args.tokens)
    ways = ways_of(runtime, work)
    for run in ways.values():
        run()  # unmeasured
    taken = in_turn(ways, args.rounds, args.seconds)
    bound = without_graphs(lambda: least(runtime, work))()  # passes inside a graph are not counted
    rows: list[dict[str, Any]] = []
    cells: list[tuple[str, ...]] = []
    for way, seconds in taken.items():
        typical, gain = statistics.median(seconds), ratio(taken["plain"], seconds)
        rate, share = work.written / typical, bound / typical
        rows.append({"case": name, "variant": way, "seconds": seconds, "tokens_per_second": rate})
        rows[-1] |= {"times_as_fast": gain, "share_of_the_bound": share}
        cells.append((way, f"{typical:.2f}", f"{rate:,.0f}", str(gain), f"{share:.2f}"))
    headings = ("", "seconds", "tokens/s", "times as fast as plain", "share of the bound")
    console.print(command.table(f"{name}: {work.written:,} tokens, bound {bound:.2f} s", headings, cells))
    return {"case": name, "bound_seconds": bound, "rows": rows}


def ways_of(runtime: Runtime, work: Work) -> dict[str, Callable[[], float]]:
    """The variants by name; each returns its seconds."""
    size = default_limits(runtime).batch_size
    tree = of_sampler(tree_sampler(runtime), work, "").run
    plain = of_sampler(plain_sampler(runtime, size), work, "").run
    return {"tree, graphs": tree, "tree": without_graphs(tree), "plain": plain}


def least(runtime: Runtime, work: Work) -> float:
    """The lower bound in seconds."""
    lm, rate = runtime.model.lm, ceilings()
    found = tree_counts(tree_sampler(runtime), work)
    weights = BF16 * sum(p.numel() for p in lm.parameters())
    cached = cached_bytes(lm) // lm.dtype.itemsize * BF16
    reading = (found.passes * weights + found.cached * cached) / rate["bytes_per_second"]
    flops = (trunk_flops(lm, found.prefill, found.prefill_attended) + head_flops(lm, len(work.contexts))) / 3
    return reading + flops / rate["bf16_flop_per_second"]


def main() -> None:
    """The command: every shape in turn."""
    parser = command.parser("gpu.sampling", __doc__)
    parser.add_argument("--case", default="", help="only shapes whose name contains this")
    parser.add_argument("--pairs", type=int, default=32, help="two contexts each (default 32)")
    parser.add_argument("--tokens", type=int, default=128, help="of each thought (default 128)")
    parser.add_argument("--rounds", type=int, default=5, help="over all ways (default 5)")
    parser.add_argument("--seconds", type=float, default=40, help="no further round after this long in a case")
    parser.add_argument("--json", type=Path, help="write machine, versions, commit and figures to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.sampling: there is no CUDA device; `python -m bench.sampling` is for a CPU")
    reports = []
    for name in SHAPES:
        if args.case in name:
            reports.append(measured(name, args, Console(width=170)))
            torch.cuda.empty_cache()
    if args.json:
        rows = [row for report in reports for row in report["rows"]]
        found = {"benchmark": "gpu.sampling", "machine": machine(), "cases": reports, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
