"""Shows reports of files: tables and sentences on a terminal, histograms as a PNG."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwrl_fast.data.check import FileReport, Overlap, lengths_of
from dwrl_fast.data.label_agreement import Agreement
from dwrl_fast.data.layouts import LAYOUTS, PLAIN
from dwrl_fast.data.preference import first_lines

PLOT = {
    "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "axes.grid": True, "grid.alpha": 0.3,
}  # fmt: skip

_shown = partial(first_lines, most=5)


def print_report(found: FileReport, console: Console) -> None:
    """Print the report of one file; of line numbers only the first ones."""
    console.rule(Text(found.format or "no format", style="bold"), align="left", style="dim")
    left = found.rows - found.used
    say(console, f"{found.path}: {found.rows:,} rows read = {found.used:,} used + {left:,} dropped")
    if found.groups:
        say(console, f"{found.groups:,} preference groups from the {found.used:,} used rows; {found.prompts:,} prompts")
    for note, count in found.notes.items():
        say(console, f"  {count:,} x {note}")
    if found.unread.summary:
        say(console, f"  {found.unread.summary}")
    for line in found.unread.warnings(found.notes):
        say(console, f"WARNING: {line}")
    if found.dropped:
        console.print(_dropped(found))
    if not found.used:
        return
    console.print(_lengths(found))
    if found.pairs:
        share = f"The longer response wins {found.longer_wins:.1%} of {found.pairs:,} pairs"
        say(
            console,
            f"{share} (equal lengths count one half). A model must beat this share to have learned more than length.",
        )
    for lines, what, meaning in (
        (found.shared_prompts, "Rows with the prompt of an earlier one", "keep them on one side of a split"),
        (
            found.repeated,
            "Rows that repeat an earlier comparison, with the same winner",
            "duplicates count twice in training",
        ),
        (
            found.conflicts,
            "Rows that contradict others",
            "the same two responses to the same prompt, with the other one as winner",
        ),
    ):
        say(
            console,
            f"{what}: " + (f"{len(lines):,}, line {_shown(lines)} ({meaning})" if lines else "none"),
        )
    if found.agreement is not None:
        say(console, f"Several labels of one comparison: {_agreement(found.agreement)}")


def print_overlap(found: Overlap, first: FileReport, second: FileReport, console: Console) -> None:
    """Print what a training file and its test file have in common."""
    console.rule(Text("both files", style="bold"), align="left", style="dim")
    if not found.prompts:
        say(console, "No prompt occurs in both files.")
    else:
        say(
            console,
            f"{found.prompts:,} prompts occur in both files: in {len(found.second_lines):,} rows of {second.path} "
            f"(line {_shown(found.second_lines)}) and in {len(found.first_lines):,} rows of {first.path} (line "
            f"{_shown(found.first_lines)}). Remove them from one of the two files.",
        )
    if found.agreement is not None:
        say(console, f"Comparisons that both files label: {_agreement(found.agreement)}")


def say(console: Console, line: str) -> None:
    """Print a sentence without interpreting markup in file names and reasons."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _dropped(found: FileReport) -> Table:
    table = Table("rows", "dropped because", "lines", title="Dropped", title_justify="left")
    table.columns[0].justify = "right"
    for reason, lines in found.dropped.items():
        said = found.advice.get(reason, reason)
        table.add_row(f"{len(lines):,}", Text(said), _shown(lines))
    return table


def _lengths(found: FileReport) -> Table:
    names = ("least", "5 %", "half", "95 %", "99 %", "most")
    table = Table("", *names, title=f"Lengths in {found.unit}, by share of the texts", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, lengths in found.lengths.items():
        table.add_row(name, *(f"{value:,}" for value in lengths))
    return table


def _agreement(found: Agreement) -> str:
    return (
        f"{found.comparisons:,} of them, {found.labels:,} labels. Krippendorff's alpha {found.krippendorff_alpha:.3f}; "
        f"Fleiss' kappa {found.fleiss_kappa:.3f} (the {found.fleiss_comparisons:,} with {found.fleiss_labels} labels); "
        f"Pearson's r of their strengths {found.pearson_r:.3f}. 1 is full agreement, 0 is chance."
    )


def print_layouts(console: Console) -> None:
    """Print all layouts."""
    for layout in LAYOUTS:
        lost = "" if layout.lost == "-" else f"; not carried: {layout.lost}"
        say(console, f"{layout.name}: {layout.title}. {layout.becomes}{lost}.".replace("`", ""))
    say(
        console,
        f"{PLAIN}: the formats of this package, unchanged. The layout of a file is detected from its first row.",
    )


def plot_lengths(reports: Sequence[FileReport], path: Path) -> None:
    """Histograms of the lengths in all files: prompts, responses, and prompts with their longest response."""
    import matplotlib
    from matplotlib.figure import Figure

    reports = [report for report in reports if report.used]
    with matplotlib.rc_context(PLOT):
        figure = Figure(figsize=(12, 3.4))
        axes = figure.subplots(1, 3)
        for axis, name in zip(axes, reports[0].lengths, strict=True):
            bins = np.geomspace(1, 1 + max(report.lengths[name].most for report in reports), 50)
            for report in reports:
                shares = np.full(len(values := lengths_of(report.counts)[name]), 1 / len(values))
                axis.hist(np.maximum(values, 1), bins, weights=shares, alpha=0.6, label=Path(report.path).name)
            axis.set(xscale="log", title=name, xlabel=report.unit)
        axes[0].set(ylabel="share")
        axes[0].legend()
        figure.tight_layout()
        figure.savefig(path, dpi=110)
