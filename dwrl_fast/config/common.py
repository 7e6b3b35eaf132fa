"""What the commands share: groups of options, and options for reading rows and for the size of a forward pass."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from dwrl_fast.batching.layout import Packing
from dwrl_fast.data import Cluster, Rankings, Ties
from dwrl_fast.methods.method_options import VllmOptions, cache_option, thoughts_option
from dwrl_fast.options import Options, at_least, option

# ruff: noqa: RUF009 - what option() returns is a dataclass field

model_option = partial(option, group="Model")
data_option = partial(option, group="Data")
forward_option = partial(option, group="Forward passes")
evaluation_option = partial(option, group="Evaluation")
run_option = partial(option, group="Run")


@dataclass(frozen=True, kw_only=True)
class CommonOptions(Options):
    """The options that all commands share: reading rows, and the size of a forward pass."""

    groups: ClassVar[tuple[str, ...]] = (
        "Model",
        "Adapters",
        "Data",
        "Method",
        "DWRL",
        "Generating thoughts",
        "Forward passes",
        "Updates",
        "Optimizer",
        "Evaluation",
        "Run",
        "Trackers",
        "Hugging Face hub",
        "Several GPUs",
        "Embedded task",
    )

    dtype: Literal["auto", "fp32", "bf16"] = model_option(
        "auto",
        "Precision of the forward and backward pass. Master weights and optimizer states are always float32. auto: "
        "fp32 on a CPU, bf16 on a GPU.",
        refused={"fp16": "its gradients underflow before a loss scale can help; use bf16, or fp32 where bf16 is slow."},
    )
    columns: dict[str, str] = data_option(
        {},
        "Rename columns, as OURS=THEIRS: --columns chosen=better --columns rejected=worse. On the command line it"
        " replaces the mapping of the YAML file.",
    )
    layout: str | None = data_option(
        None,
        "Layout of the data: a name from `python -m dwrl_fast.data --formats`, or plain for the columns of this "
        "package. Layouts of pairs can be combined: sharegpt+system. none: detected from the first row of each file.",
    )
    ties: Ties = data_option(
        "drop",
        "Pairs of equally good responses. drop: leave them out and count them. keep: train on them as ties. A ranking"
        " that is kept whole (--rankings plackett_luce) always keeps ties between some of its responses.",
    )
    rankings: Rankings = data_option(
        "pairs",
        "How a ranking of more than two responses is used. pairs: every pair of responses, with the difference of their"
        " scores, or else ranks, as margin. plackett_luce: one group. An evaluation counts it as one row either way;"
        " --method sft trains on its best response alone.",
    )
    max_length: int = data_option(
        4096,
        "Maximum tokens of prompt and response together. Longer rows are dropped and counted, never cut.",
        bound=at_least(1),
    )
    packing: Packing = forward_option(
        "tree",
        "How sequences are packed for a forward pass. tree: a shared prefix is computed once. packed: sequences end to"
        " end. padded: one sequence per row, for models that cannot run the other two. The results are the same.",
    )
    token_budget: int = forward_option(
        16384,
        "Maximum tokens of one forward pass, padding included. Affects memory and speed, not the result. A preference "
        "group is never split.",
        bound=at_least(1),
    )
    seed: int = run_option(
        0, "Seed of all randomness: order, thoughts, initial weights, resampling.", bound=at_least(0)
    )


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(VllmOptions, CommonOptions):
    """The options shared by the commands that judge with trained models."""

    limit: int | None = data_option(
        None, "Use only the first rows of each file, this many. none: all.", bound=at_least(1)
    )
    generation_batch_size: int = thoughts_option(
        256,
        "Thoughts generated at the same time. Lower it if generation runs out of memory. An interrupted evaluation "
        "loses at most one such step.",
        bound=at_least(1),
    )
    generation_cache_gib: float = cache_option()
    cluster: Cluster = evaluation_option(
        "row",
        "Unit of the bootstrap and of McNemar's test. row: a row of the file with all its pairs. prompt: a prompt with "
        "all its rows, for data in which several rows share a prompt.",
    )
