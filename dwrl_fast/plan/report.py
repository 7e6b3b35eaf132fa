"""Shows a plan: tables on a terminal, a plot as PNG, and JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dwrl_fast.compute import GIB
from dwrl_fast.plan.memory import Memory
from dwrl_fast.plan.seconds import flops
from dwrl_fast.plan.setup import Setup
from dwrl_fast.plan.sizing import Sized, room
from dwrl_fast.plan.trace import Traced

ORDER = (
    "weights", "optimizer", "gradients", "whole copy", "frozen model", "gathered weights", "cast weights",
    "gathered gradients", "collectives", "activations", "head workspace", "keys and values", "vLLM",
)  # fmt: skip
DPI = 110


def say(console: Console, line: str) -> None:
    """Print a sentence without interpreting markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def head(setup: Setup, console: Console) -> None:
    """Print what is planned, and for which device."""
    config, shape = setup.config, setup.shape
    lengths = setup.lengths
    kind = str(setup.dtype).removeprefix("torch.")
    adapters = f", {shape.stack.trained + shape.root.trained:,} of them trained" if config.use_peft else ""
    say(console, f"{config.method} on {shape.name}, {shape.parameters:,} parameters{adapters}, {kind}")
    say(
        console,
        f"lengths given: prompt {lengths.prompt}, responses {lengths.response}, thoughts {lengths.thought} tokens; "
        f"rollout batches of {config.rollout_batch_size}, minibatches of {config.minibatch_size} groups",
    )
    say(console, f"device: {setup.profile.source}")
    if setup.profile.shares:
        shares = ", ".join(f"{name} {share:g}" for name, share in setup.profile.shares.items())
        say(console, f"shares of these rates that a run is assumed to reach (not measured): {shares}")


def memory_table(setup: Setup, found: Sized, console: Console) -> None:
    """Print the memory of one GPU by kind, at every moment."""
    moments = found.memory.moments
    title = f"GiB of each of {found.gpus} GPU{'s' * (found.gpus > 1)}, micro-batches of {found.budget or 'any'} tokens"
    table = _table(title, "", *moments)
    table.columns[0].justify = "left"
    for kind in ORDER:
        if any(kind in kinds for kinds in moments.values()):
            table.add_row(kind, *(f"{kinds.get(kind, 0) / GIB:.2f}" for kinds in moments.values()))
    table.add_section()
    table.add_row("sum", *(f"{found.memory.sum(moment) / GIB:.2f}" for moment in moments))
    console.print(table)


def verdict(setup: Setup, found: Sized, traced: Traced, console: Console) -> None:
    """Print whether the run fits, the largest budget, and the peak of the trace."""
    config: Any = setup.config
    limit = room(setup) / GIB
    fits = "fits" if found.budget == config.token_budget else "does not fit"
    say(
        console,
        f"--token_budget {config.token_budget} {fits} into {limit:.1f} GiB (--reserve_gib {config.reserve_gib:g} is "
        f"kept free); the largest that fits: {found.largest or 'none'}",
    )
    group = traced.large
    say(
        console,
        f"traced: a micro-batch of {group.tokens} tokens, {group.rows} rows of the head, holds "
        f"{group.most.total() / GIB:.2f} GiB at most without optimizer and copies",
    )
    parts = ", ".join(f"{name} {size / 1e12:.1f}" for name, size in flops(setup).items())
    say(console, f"TFLOP of the model for one group: {parts}")


def size_table(setup: Setup, found: Sequence[Sized], console: Console) -> None:
    """Print a table with a line per number of GPUs, and a second table with the stages of a step."""
    config: Any = setup.config
    costs = [f"cost at {config.price:g}"] if config.price else []
    table = _table("By number of GPUs; largest: the budget of full micro-batches that fits", "GPUs", "GiB", "budget",
                   "largest", "step, s", "epoch, h", "GPU hours", *costs)  # fmt: skip
    for each in found:
        hours = each.hours(config.rows, config.rollout_batch_size)
        cells = [f"{each.gpus:,}", f"{each.memory.peak / GIB:.1f}", f"{each.budget:,}", f"{each.largest:,}"]
        if not each.fits:
            cells[2:] = ["-", "none"]
        else:
            cells += [f"{sum(each.seconds.values()):.3g}", f"{hours:.3g}", f"{hours * each.gpus:,.1f}"]
            cells += [f"{hours * each.gpus * config.price:,.0f}"] if config.price else []
        table.add_row(*cells)
    console.print(table)
    fitting = [each for each in found if each.fits]
    stages = list(dict.fromkeys(stage for each in fitting for stage in each.seconds))
    table = _table("Seconds of a step by stage", "GPUs", *stages)
    for each in fitting:
        table.add_row(f"{each.gpus:,}", *(f"{each.seconds[stage]:.3g}" for stage in stages))
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    made = Table(*columns, title=title, title_justify="left")
    for column in made.columns:
        column.justify = "right"
    return made


def to_dict(setup: Setup, found: Sequence[Sized]) -> dict[str, Any]:
    """As JSON: bytes by kind and moment, and seconds by stage, for every number of GPUs."""
    config: Any = setup.config
    rows = []
    for each in found:
        hours = each.hours(config.rows, config.rollout_batch_size)
        row: dict[str, Any] = {
            "gpus": each.gpus,
            "token_budget": each.budget,
            "largest_token_budget": each.largest,
            "fits": each.fits,
        }
        row |= {"bytes": each.memory.moments, "seconds": each.seconds, "epoch_hours": hours}
        rows.append(row | ({"cost": hours * each.gpus * config.price} if config.price else {}))
    return {"options": config.to_dict(), "shape": setup.shape._asdict(), "flop_per_group": dict(flops(setup)),
            "sizes": rows}  # fmt: skip


def plot(setup: Setup, found: Sequence[Sized], path: Path) -> None:
    """Plot the memory by kind at the peak, the seconds of a step by stage, and the hours (and cost) of an epoch."""
    from matplotlib.figure import Figure

    config: Any = setup.config
    figure = Figure(figsize=(13, 3.8))
    memory, seconds, epoch = figure.subplots(1, 3)
    places = [str(each.gpus) for each in found]
    _stack(memory, places, [_peak(each.memory) for each in found], ORDER)
    memory.axhline(room(setup) / GIB, color="black", linestyle="--", linewidth=1)
    memory.set(title="peak GiB of a GPU; the line is the limit", xlabel="GPUs")
    fitting = [each for each in found if each.fits]
    stages = list(dict.fromkeys(stage for each in fitting for stage in each.seconds))
    _stack(seconds, [str(each.gpus) for each in fitting], [each.seconds for each in fitting], stages)
    seconds.set(title="seconds of a step", xlabel="GPUs")
    hours = [each.hours(config.rows, config.rollout_batch_size) for each in fitting]
    epoch.plot([each.gpus for each in fitting], hours, marker="o", label="hours of an epoch")
    epoch.plot([each.gpus for each in fitting], [h * e.gpus for h, e in zip(hours, fitting, strict=True)], marker="s",
               label="GPU hours")  # fmt: skip
    epoch.set(title=f"an epoch of {config.rows:,} groups", xlabel="GPUs", xscale="log", yscale="log")
    for axis in (memory, seconds, epoch):
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
        axis.title.set_fontsize(8)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)


def _peak(memory: Memory) -> dict[str, float]:
    return {kind: size / GIB for kind, size in memory.moments[memory.fullest].items()}


def _stack(axis: Any, places: Sequence[str], values: Sequence[dict[str, float]], kinds: Sequence[str]) -> None:
    below = [0.0] * len(places)
    for kind in kinds:
        heights = [each.get(kind, 0.0) for each in values]
        if any(heights):
            axis.bar(places, heights, bottom=below, label=kind)
            below = [low + height for low, height in zip(below, heights, strict=True)]
