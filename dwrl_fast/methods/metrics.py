"""The figures of a training step, summed over its micro-batches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch
from dwrl_fast.data.jsonl import finite
from dwrl_fast.encode import Group
from dwrl_fast.ranks import Ranks


@dataclass(slots=True)
class StepMetrics:
    """Sums with counts, kept on the device. Means are computed once per step, so they do not depend on micro-batches,
    and the device is synchronised only once.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int | Tensor] = field(default_factory=dict)
    policy: list[Tensor] = field(default_factory=list)
    scored: list[tuple[Batch, Tensor]] = field(default_factory=list)
    restored: dict[Group, list[list[float]]] = field(default_factory=dict)  # scores computed before the run was resumed

    def add(self, name: str, values: Tensor, count: int | None = None, where: Tensor | None = None) -> None:
        """Add values. Each counts once (with `where`: only where it is true), or `values` is already a sum over `count`
        values.
        """
        taken = values.detach().double()
        total = taken.sum() if where is None else torch.where(where, taken, 0).sum()
        more = where.sum() if where is not None else values.numel() if count is None else count
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + more

    def add_scores(self, batch: Batch, scores: Tensor) -> None:
        """Store the model's scores [S] for `batch`, in nats. Only the last scores of a group are kept."""
        self.scored.append((batch, scores.detach()))

    def copy(self) -> "StepMetrics":
        """An independent copy, to return to."""
        return StepMetrics(
            dict(self.sums), dict(self.counts), list(self.policy), list(self.scored), dict(self.restored)
        )

    def joined(self, ranks: Ranks) -> "StepMetrics":
        """A copy with the sums over all ranks; the scores are still those of this rank. Synchronises."""
        if ranks.mesh is None:
            return self
        sums = {name: total.cpu() for name, total in self.sums.items()}
        counts = {name: int(count) for name, count in self.counts.items()}
        policy = [ops.combine_stats(self.policy).cpu()] if self.policy else []
        found = StepMetrics(scored=self.scored)
        for more, of, stats in ranks.gather((sums, counts, policy)):
            for name, total in more.items():
                found.sums[name] = found.sums[name] + total if name in found.sums else total
                found.counts[name] = found.counts.get(name, 0) + of[name]
            found.policy += stats
        return found

    def means(self) -> dict[str, float]:
        """Means by name (nan if nothing was counted), and the statistics of the policy loss. Synchronises."""
        counts = {name: int(count) for name, count in self.counts.items()}
        found = {name: total.item() / counts[name] if counts[name] else math.nan for name, total in self.sums.items()}
        if self.policy:
            stats = ops.read_stats(ops.combine_stats(self.policy))
            found |= {"ratio": stats["ratio"], "ratio_max": stats["ratio_max"], "clip_fraction": stats["clipped"]}
            found |= {"entropy": stats["entropy"], "trained_tokens": stats["tokens"], "invalid": stats["invalid"]}
        return found

    def scores(self, groups: Sequence[Group]) -> list[list[list[float]]]:
        """The last scores of each of `groups`: K lists of N, empty if there are none. Synchronises."""
        found = dict(self.restored)
        for batch, scores in self.scored:
            found |= zip(batch.groups, batch.by_sequence(scores.tolist()), strict=True)
        return [found.get(group, []) for group in groups]

    def state(self, groups: Sequence[Group]) -> dict[str, Any]:
        """The state of a step over `groups` as JSON; values that are not finite become null. Synchronises."""
        return {
            "sums": finite({name: total.item() for name, total in self.sums.items()}),
            "counts": {name: int(count) for name, count in self.counts.items()},
            "policy": finite([stats.tolist() for stats in self.policy]),
            "scores": finite(self.scores(groups)),
        }

    def restore(self, state: Mapping[str, Any], groups: Sequence[Group], device: torch.device) -> None:
        """Add a `state` of the same step. Called on one rank only."""
        for name, total in state["sums"].items():
            self.add(name, _tensor(total, device), state["counts"][name])
        self.policy += [_tensor(stats, device) for stats in state["policy"]]
        given = ((group, scores) for group, scores in zip(groups, state["scores"], strict=True) if scores)
        self.restored |= {group: [[_number(one) for one in some] for some in scores] for group, scores in given}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _tensor(values: Any, device: torch.device) -> Tensor:
    """A float64 tensor from a number or a list of numbers."""
    some = [_number(each) for each in values] if isinstance(values, list) else _number(values)
    return torch.tensor(some, dtype=torch.float64, device=device)
