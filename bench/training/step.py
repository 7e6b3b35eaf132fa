"""Times one DWRL minibatch, phases A and B, forward and backward, without the optimizer step.

    python -m bench.training.step --quick

Times are per thought token and pass; A and B count as two passes, TRL's update as one. Cases are `model/data` with
thoughts of 40 tokens on average, and `model/data-200` with 200. Models have random weights: `trunk-heavy` spends its
time in the layers, `head-heavy` in the head. `trunk/X-Y-Oxn` is the backbone alone, for comparing the ratios of time
and memory with the ratio of tokens. Counters: positions of one pass, positions without sharing, rows of the head,
padding, and model FLOPs (flops.py) of a pass with and without sharing.

On a GPU the model has the shape of Qwen2.5-7B and computes in bfloat16 with float32 masters. By default it has only
some of its layers; `--layers 28 --checkpointing` uses all of them. Seconds are then per pass over the minibatch, and
utilisation is relative to the rate of a large matrix product in the same run.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import command
from bench.harness import Case, Row, Variant, main, tensors
from bench.machine import ceilings
from bench.training import lengths
from bench.training.plain_update import plain
from bench.training.trl_update import liger_installed, trl, trl_missing
from bench.training.update import Setting, Way, counters, fastest, ours, setting, update
from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.layout import Packing
from dwrl_fast.models.backbone import backbone_states

PER = "thought token per forward + backward"
COMMON = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "initializer_range": 0.05}
MODELS: dict[str, dict[str, Any]] = {
    "trunk-heavy": COMMON
    | {"model_type": "llama", "vocab_size": 32003, "hidden_size": 512, "intermediate_size": 1376}
    | {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
    "head-heavy": COMMON
    | {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 256, "intermediate_size": 1024}
    | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
}
MEANS = {"": 40, "-200": 200}
TRUNKS = ((256, 128, 160), (512, 512, 416))
# For the GPU cases. A layer of the 7B keeps .26 MB per token for its backward pass: with 6 layers, 24,576 tokens need
# 38 GB, in addition to 10 GB of weights, 10 GB of gradients, and 5 GB of bfloat16 copies.
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
LAYERS, TOKEN_BUDGET = 6, 24576
SYNTHETIC = (512, 512, 416)
GPU_PAIRS = {"512-512-416": 4, "hh": 16, "hh-200": 8, "rmb": 8, "rmb-200": 8}
ROUNDED = 0.1  # bound between gradients of bfloat16 layouts
ASKED = 2.0  # target for the time of packed relative to the tree, at SYNTHETIC


def variants(it: Setting, source: str, times: float) -> list[Variant]:
    """The variants of one minibatch. times: the number of units that a pass counts as."""
    passes = len(it.method.phases)

    def variant(name: str, way: Way | None, passes: int = passes, note: str = "", **options: Any) -> Variant:
        if way is None:
            return Variant(name, None, "one pair does not fit into memory")
        return Variant(
            name,
            way.run,
            times=passes * times,
            flops=passes * 1e9 * way.counters["model GFLOP"],
            note=way.note + note,
            counters=way.counters,
            **options,
        )

    problem = trl_missing()
    liger = (False, True) if torch.cuda.is_available() and liger_installed() else (False,)
    return [
        variant("tree", ours(it, "tree"), note=f"; {source}"),
        variant("packed", ours(it, "packed")),
        variant("padded", fastest(plain(it))),
        variant("padded-fused", ours(it, "padded"), quick=False),
        Variant("trl", None, problem)
        if problem
        else variant("trl", fastest(*(trl(it, on) for on in liger)), passes=1, comparable=False),
    ]


def cpu_variants(shape: Mapping[str, Any], data: str, mean: int) -> list[Variant]:
    """The variants with the lengths of `data` and thoughts of `mean` tokens; seconds are per thought token."""
    pairs = lengths.pairs(data)
    it = setting(shape, pairs, lengths.thought_lengths(mean, 2 * lengths.THOUGHTS * len(pairs.contexts)))
    return variants(it, pairs.source, sum(map(len, it.old)))


def gpu_variants(shape: Mapping[str, Any], data: str, count: int, checkpointing: bool) -> list[Variant]:
    """The variants for `count` pairs of `data`, a key of GPU_PAIRS; seconds are per pass."""
    name = data.removesuffix("-200")
    if name in lengths.FILES:
        pairs = lengths.pairs(name, count)
        thoughts = lengths.thought_lengths(MEANS[data.removeprefix(name)], 2 * lengths.THOUGHTS * count)
    else:
        pairs = lengths.synthetic(count, *SYNTHETIC[:2])
        thoughts = [SYNTHETIC[2]] * (2 * lengths.THOUGHTS * count)
    it = setting(shape, pairs, thoughts, checkpointing=checkpointing, token_budget=TOKEN_BUDGET)
    found = [each for each in variants(it, pairs.source, 1) if each.name != "padded-fused"]
    return [replace(each, run=each.run and partial(gradients, each.run)) for each in found]


def gradients(run: Callable[[], object]) -> list[Tensor]:
    """The gradients without the losses: the loss of the thoughts is a sum that cancels, and in bfloat16 mostly
    rounding.
    """
    return [x for x in tensors(run()) if x.dim()]


def trunk_variants(shape: Mapping[str, Any], prompt: int, response: int, rest: int) -> list[Variant]:
    """The backbone alone over one synthetic pair; gradients enter at the rows of the head."""
    it = setting(shape, lengths.synthetic(1, prompt, response), [rest] * (2 * lengths.THOUGHTS))
    lm, runtime = it.runtime.model.lm, it.runtime

    def variant(packing: Packing) -> Variant:
        (batch,) = replace(runtime.layout, packing=packing, token_budget=sys.maxsize).batches(it.groups)
        g = torch.Generator().manual_seed(0)
        gradient = torch.randn(len(batch.token_rows), lm.config.hidden_size, generator=g).to(lm.device)

        def states(batch: Batch) -> Tensor:
            with runtime.compute.autocast():
                return backbone_states(lm.base_model, batch)[batch.token_rows]

        def phase(batch: Batch) -> Tensor:
            return (states(batch) * gradient).sum()

        held = {"saved MiB": saved_bytes(lambda: states(batch), lm.parameters()) / 2**20}
        return Variant(packing, lambda: update(lm, [batch], [phase]), counters=counters([batch]) | held)

    return [variant("tree"), variant("packed")]


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that `forward` saves for the backward pass: each storage once, without those of `parameters`."""
    kept: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no later storage gets the same address

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


def summary(rows: Collection[Row], console: Console) -> None:
    """Print the times relative to the tree; for the trunk alone, next to the ratio of tokens."""
    seconds = {(row.case, row.variant): row.seconds_median for row in rows}
    tokens, saved = (
        {(row.case, row.variant): row.counters.get(key) for row in rows} for key in ("trunk tokens", "saved MiB")
    )
    names = list(dict.fromkeys(row.case for row in rows))

    def ratio(of: Mapping[tuple[str, str], float | None], case: str, variant: str) -> str:
        this, tree = of.get((case, variant)), of.get((case, "tree"))
        return f"{this / tree:.2f}" if this and tree else "-"

    peers = ("packed", "padded", "trl")
    whole = [case for case in names if (case, "tree") in seconds and not case.startswith("trunk/")]
    lines = [(case, *(ratio(seconds, case, variant) for variant in peers)) for case in whole]
    if lines:
        console.print(command.table("time in units of the tree's", ("case", *peers), lines))
    lines = [
        (case, *(ratio(of, case, "packed") for of in (tokens, seconds, saved)))
        for case in names
        if case.startswith("trunk/")
    ]
    if lines:
        headings = ("case", "tokens", "time", "activation memory")
        console.print(command.table("backbone alone, packed in units of the tree's", headings, lines))
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        console.print(utilisation(rows, ceilings()["bf16_flop_per_second"]))
    for case in (name for name in names if name.endswith("/512-512-416")):
        console.print(
            f"{case}: packed takes {ratio(seconds, case, 'packed')} times as long as the tree; asked are {ASKED:.1f}"
        )


def utilisation(rows: Collection[Row], product: float) -> Table:
    """Utilisation relative to the rate of a large product: of the model FLOPs that a variant computes, and of those
    that the same update would need without sharing.
    """
    lines = []
    for row in rows:
        if row.seconds_median and row.flop_rate:
            naive = row.flop_rate * row.counters["naive GFLOP"] / row.counters["model GFLOP"]
            rates = (f"{row.flop_rate / 1e12:.0f}", *(f"{each / product:.2f}" for each in (row.flop_rate, naive)))
            peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}"
            lines.append((row.case, row.variant, f"{1e3 * row.seconds_median:.1f}", *rates, peak))
    return command.table(
        f"utilisation, of {product / 1e12:.0f} TFLOP/s of a large product",
        ("case", "variant", "ms a pass", "TFLOP/s", "utilisation", "as naive", "peak GiB beyond weights"),
        lines,
        left=2,
    )


def head_row(shape: Mapping[str, Any]) -> float:
    """Multiplications of one row of the head, the unit for the counts of products."""
    return float(shape["hidden_size"] * shape["vocab_size"])


def trunk_case(prompt: int, response: int, rest: int) -> Case:
    """The backbone alone, at these lengths of prompt, response, and thought with fixed turns."""
    return Case(
        f"trunk/{prompt}-{response}-{rest}x{lengths.THOUGHTS}",
        lambda: trunk_variants(MODELS["trunk-heavy"], prompt, response, rest),
        quick=False,
        unit=head_row(MODELS["trunk-heavy"]),
    )


def step_case(model: str, data: str, suffix: str) -> Case:
    """A minibatch of `model` with the lengths of `data`. suffix: selects the mean length of thoughts in MEANS."""
    return Case(
        f"{model}/{data}{suffix}",
        lambda: cpu_variants(MODELS[model], data, MEANS[suffix]),
        quick=(model, data, suffix) == ("trunk-heavy", "hh", ""),
        unit=head_row(MODELS[model]),
        per=PER,
    )


CASES = [step_case(model, data, suffix) for model in MODELS for data in lengths.FILES for suffix in MEANS]
CASES += [trunk_case(*sizes) for sizes in TRUNKS]


def gpu_cases(layers: int, checkpointing: bool) -> list[Case]:
    """The GPU cases with `layers` layers of the 7B."""
    shape = QWEN_7B | {"num_hidden_layers": layers}
    model = f"qwen2.5-7b-{layers}{'-checkpointed' if checkpointing else ''}"
    return [
        Case(
            f"{model}/{data}",
            partial(gpu_variants, shape, data, count, checkpointing),
            quick=data == next(iter(GPU_PAIRS)),
            unit=head_row(shape),
            per="pass",
            loose=ROUNDED,
        )
        for data, count in GPU_PAIRS.items()
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options for GPU cases."""
    parser.add_argument("--layers", type=int, help=f"of the 7B's 28 layers (default {LAYERS}; a GPU's cases)")
    parser.add_argument("--checkpointing", action="store_true", help="keep one state a layer (a GPU's cases)")


def cases(args: argparse.Namespace) -> list[Case]:
    """The GPU cases if there is a GPU or --layers is given; otherwise the CPU cases."""
    if torch.cuda.is_available() or args.layers:
        return gpu_cases(args.layers or LAYERS, args.checkpointing)
    return CASES


if __name__ == "__main__":
    main("training.step", __doc__, cases, summary, options)
