"""The plots of a report, each as SVG."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwrl_fast.evaluation.report import SLICED, Report
from dwrl_fast.evaluation.table import Slice
from dwrl_fast.log import escaped

RIGHT, WRONG, PLAIN = "#2f7ed8", "#d8572f", "#888888"
MOST_SLICES = 24  # more would be unreadable


def figures(report: Report, gap: NDArray[np.float64]) -> dict[str, str]:
    """The plots: title -> SVG. gap: [P], score of the better response minus that of the worse."""
    shown = {SLICED[by][0]: slices[:MOST_SLICES] for by, slices in report.slices.items()}
    return {
        "Reliability": _svg(partial(_reliability, report)),
        "Score differences": _svg(partial(_gaps, gap)),
        **({"Accuracy by votes": _svg(partial(_votes, report))} if report.votes else {}),
        **{title: _svg(partial(_slices, some), 1.0 + 0.3 * len(some)) for title, some in shown.items()},
    }


def _svg(draw: Callable[[Any], None], height: float = 3.6) -> str:
    """The SVG of a plot. Equal figures give equal bytes. Text is drawn as shapes, so that no font is needed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "dwrl_fast", "svg.fonttype": "path", "font.size": 9, "legend.fontsize": 7}
    ):
        figure = Figure(figsize=(5.2, max(height, 2.0)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _reliability(report: Report, axes: Any) -> None:
    axes.plot([0.5, 1], [0.5, 1], "--", color=PLAIN, label="perfect calibration")
    for found, color, label in (
        (report.calibration, RIGHT, "as scored"),
        (report.calibrated, WRONG, "with the fitted temperature"),
    ):
        if found is not None:
            points = [(b.confidence, b.accuracy) for b in found.bins]
            axes.plot(*zip(*points, strict=True), "-", color=color, alpha=0.5)
            sizes = [12 + 250 * b.share for b in found.bins]
            axes.scatter(*zip(*points, strict=True), s=sizes, color=color, label=label)
    axes.set(xlabel="confidence, sigmoid(|score difference|)", ylabel="accuracy", xlim=(0.48, 1.02), ylim=(-0.03, 1.03))


def _gaps(gap: NDArray[np.float64], axes: Any) -> None:
    finite = gap[np.isfinite(gap)]
    if not len(finite):
        axes.text(0.5, 0.5, "every difference is infinite", ha="center", transform=axes.transAxes)
        return
    reach = float(np.quantile(np.abs(finite), 0.99)) or 1.0
    edges = np.linspace(-reach, reach, 41)
    for values, color, label in ((finite[finite < 0], WRONG, "wrong"), (finite[finite >= 0], RIGHT, "right or equal")):
        axes.hist(np.clip(values, -reach, reach), edges, color=color, label=f"{label} ({len(values):,})")
    axes.set(xlabel="score of the better response minus that of the worse (nats)", ylabel="pairs")


def _votes(report: Report, axes: Any) -> None:
    for by, color in (("mean", RIGHT), ("majority", WRONG)):
        points = [p for p in report.votes if p.by == by]
        if points:
            spread = np.array([[p.accuracy - p.low, p.high - p.accuracy] for p in points]).clip(0).T
            x, y = [p.votes for p in points], [p.accuracy for p in points]
            axes.errorbar(x, y, spread, fmt="o-", color=color, capsize=3, label=by)
    ticks = sorted({p.votes for p in report.votes})
    axes.set(xlabel="thoughts", ylabel="accuracy", xscale="log")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()


def _slices(slices: Sequence[Slice], axes: Any) -> None:
    some = slices[::-1]
    for y, one in enumerate(some):
        axes.plot([one.low, one.high], [y, y], "-", color=RIGHT)
    axes.plot([one.accuracy for one in some], range(len(some)), "o", color=RIGHT, label="model")
    axes.plot([one.longer_wins for one in some], range(len(some)), "x", color=PLAIN, label="longer wins")
    axes.axvline(0.5, color=PLAIN, linewidth=0.8)
    # A name is the user's: "$" would begin a formula.
    axes.set_yticks(range(len(some)), [escaped(one.name)[:40].replace("$", r"\$") for one in some])
    axes.set(xlabel="accuracy", xlim=(-0.03, 1.03), ylim=(-0.6, len(some) - 0.4))
