"""The curves of a run in one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# title -> the metrics drawn in its panel
PANELS: dict[str, tuple[str, ...]] = {
    "negative log-likelihood (nats)": ("loss",),
    "pair accuracy": ("train_accuracy", "eval_greedy"),
    "p(Yes)": ("p_chosen", "p_rejected"),
    "reward": ("reward_chosen", "reward_rejected"),
    "misalignment": ("misalignment",),
    "effective groups a minibatch": ("effective_groups",),
    "mean |A|": ("advantage",),
    "policy ratio": ("ratio", "ratio_max"),
    "clip fraction": ("clip_fraction",),
    "entropy (nats)": ("entropy",),
    "thought length (tokens)": ("thought_length",),
    "gradient norm": ("grad_norm_score", "grad_norm_thought", "grad_norm_joint"),
}


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Plot the metrics of `metrics.jsonl` over the steps. Panels without figures are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        panel: kept
        for panel, names in PANELS.items()
        if (kept := [name for name in names if any(row.get(name) is not None for row in rows)])
    }
    if not panels:
        return
    columns = 3
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(12, 2.6 * -(-len(panels) // columns)), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (panel, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 12 else None)
        axis.set_title(panel, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.supxlabel("step (rollout batches)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
