"""What the commands share: the groups of options, reading rows, the size of a forward pass."""

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
    """What both commands share: reading rows, the size of a forward pass."""

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
        "Several GPUs",
        "Embedded task",
    )

    dtype: Literal["auto", "fp32", "bf16"] = model_option(
        "auto",
        "What the forward and backward pass compute in; master weights and optimizer states are float32 either way. "
        "auto: fp32 on a CPU, bf16 on a GPU.",
        refused={"fp16": "its gradients underflow before a loss scale can help; use bf16, or fp32 where bf16 is slow."},
    )
    columns: dict[str, str] = data_option(
        {},
        "Rename columns, new=old: --columns chosen=better --columns rejected=worse. May be given several times; given"
        " on the command line it replaces the mapping of the YAML file.",
    )
    layout: str | None = data_option(
        None,
        "The layout of the data, by its name in `python -m dwrl_fast.data --formats`, or plain: the columns of this"
        " package. Layouts of pairs can be joined: sharegpt+system. none: told from the first row of each file.",
    )
    ties: Ties = data_option(
        "drop",
        "Pairs of equally good responses. drop: left out and counted. keep: trained as ties, with no winner. A ranking"
        " that is kept whole (--rankings plackett_luce) keeps ties between some of its responses either way.",
    )
    rankings: Rankings = data_option(
        "pairs",
        "What a ranking of more than two responses becomes. pairs: every two of them, with the difference of their"
        " scores or else ranks as margin. plackett_luce: one group. In evaluation it is one row either way.",
    )
    max_length: int = data_option(
        4096,
        "The most tokens that prompt and response may have together. Longer rows are dropped and counted, never cut.",
        bound=at_least(1),
    )
    packing: Packing = forward_option(
        "tree",
        "How sequences are laid out in a forward pass. tree: what they share at their beginning is computed once."
        " packed: end to end. padded: one a row, for models that the other two refuse. The results are the same.",
    )
    token_budget: int = forward_option(
        16384,
        "Tokens in one forward pass, padding included. Sets memory and speed, not the result; a preference group is "
        "never split.",
        bound=at_least(1),
    )
    seed: int = run_option(0, "Of everything drawn: order, thoughts, drawn weights, resampling.", bound=at_least(0))


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(VllmOptions, CommonOptions):
    """What the commands share that judge with trained models."""

    limit: int | None = data_option(
        None, "Use only so many of a file's first rows. none: all of them.", bound=at_least(1)
    )
    generation_batch_size: int = thoughts_option(
        256,
        "Thoughts generated at once, and so what one step holds. Lower it when generation runs out of memory. Of an "
        "evaluation that is interrupted one step is lost.",
        bound=at_least(1),
    )
    generation_cache_gib: float = cache_option()
    cluster: Cluster = evaluation_option(
        "row",
        "What is drawn for an interval, and counted by McNemar's test. row: the rows of the files, each with all its "
        "pairs. prompt: the prompts, each with all its rows, for sets in which several rows share one.",
    )
