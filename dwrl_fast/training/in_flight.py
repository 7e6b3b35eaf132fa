"""The rollout batch that is being trained, and the progress of its updates. Checkpoints store it as JSON."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from dwrl_fast.data.jsonl import finite
from dwrl_fast.encode import Group, group_of, group_record


@dataclass
class InFlight:
    """groups: with their thoughts and the old policy's log-probs. figures: of the rollout. done: the number of its
    updates so far, over all phases. norms: gradient norms of each phase before clipping. seconds: its duration before
    the run was resumed.
    """

    groups: list[Group]
    figures: dict[str, Any]
    done: int = 0
    norms: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    seconds: float = 0.0

    def state(self, metrics: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """The state as JSON. metrics: `StepMetrics.state` of each rank. seconds: since its start. Synchronises."""
        return {
            "groups": [group_record(group) for group in self.groups],
            "figures": finite(self.figures),
            "done": self.done,
            "norms": {phase: torch.stack(some).tolist() for phase, some in self.norms.items() if some},
            "seconds": seconds,
            "metrics": list(metrics),
        }

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> Self:
        """The inverse of `state`, without the metrics."""
        norms = {phase: list(torch.tensor(some, device=device)) for phase, some in state["norms"].items()}
        return cls(
            [group_of(record) for record in state["groups"]],
            {name: math.nan if value is None else value for name, value in state["figures"].items()},
            state["done"],
            defaultdict(list, norms),
            state["seconds"],
        )
