"""The examined setup, and what its trainer computes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch
from dwrl_fast.config import TrainConfig
from dwrl_fast.encode import Group
from dwrl_fast.methods import Method
from dwrl_fast.sampling import Sampler
from dwrl_fast.scoring import Judging, Runtime

NATS_WARN = 0.02  # mean difference of log-probs: about the rounding of bfloat16
NATS_FAIL = 0.1  # half of the usual clip range, log 1.2: ratios would be clipped without any change of the policy


@dataclass(frozen=True, slots=True)
class Setup:
    """One run's method and model, placed as they would be trained. sampler: the sampler of the thoughts that the method
    trains on or judges with; None if there are none.
    """

    config: TrainConfig
    method: Method
    judging: Judging
    sampler: Sampler | None

    @property
    def runtime(self) -> Runtime:
        """The loaded model."""
        return self.judging.runtime

    @property
    def temperature(self) -> float:
        """The temperature of the sampler's log-probs; for greedy thoughts it is 1."""
        return self.method.sampling_temperature or 1.0

    @property
    def samples_itself(self) -> bool:
        """Whether the examined model itself writes the thoughts."""
        return self.method.thinks and self.method.writer is None and self.sampler is not None

    @property
    def reads_labels(self) -> bool:
        """Whether the verdict is the probability of a label."""
        return self.method.verdict.startswith("label")


class Computed(NamedTuple):
    """The trainer's results for one group: scores of its sequences and log-probs of its trained tokens, in nats, both
    flat, float32 on the CPU; empty if the model gives none.
    """

    scores: Tensor
    logprobs: Tensor


def compute(setup: Setup, groups: Sequence[Group], packing: Any = None) -> list[Computed]:
    """The results for every group, in the layout of the run or in `packing`. All ranks call this together."""
    runtime, method, labels = setup.runtime, setup.method, setup.method.dialog.label_ids
    if packing is not None:
        runtime = dataclasses.replace(runtime, layout=dataclasses.replace(runtime.layout, packing=packing))

    def read(batch: Batch) -> list[Computed]:
        if method.scalar:
            return [Computed(_flat(some), torch.empty(0)) for some in batch.by_sequence(runtime.model(batch).tolist())]
        head = runtime.model(batch, tokens=True)
        logprobs = batch.by_token(head.logprobs(head.token, batch.targets, setup.temperature))
        if labels is None:
            return [Computed(torch.empty(0), _flat(some)) for some in logprobs]
        scores = batch.by_sequence(head.scores(labels, setup.config.score_normalization).tolist())
        return [Computed(_flat(one), _flat(other)) for one, other in zip(scores, logprobs, strict=True)]

    return runtime.run_batches(groups, read)


def said(groups: Sequence[Group]) -> Tensor:
    """The sampler's log-probs of all tokens of the thoughts, flat."""
    return _flat([thought.logprobs for group in groups for some in group.thoughts for thought in some])


def difference(some: Sequence[Computed], others: Sequence[Computed]) -> dict[str, float]:
    """The mean (over tokens or sequences) and maximum difference between the two, for the values that both have."""
    found: dict[str, float] = {}
    for name in Computed._fields:
        pairs = [(getattr(one, name), getattr(other, name)) for one, other in zip(some, others, strict=True)]
        apart = torch.cat([(one - other).abs() for one, other in pairs])
        if len(apart):
            found |= {f"{name} mean": apart.mean().item(), f"{name} most": apart.max().item()}
    return found


def _flat(nested: Any) -> Tensor:
    while nested and isinstance(nested[0], list):
        nested = [value for some in nested for value in some]
    return torch.tensor(nested, dtype=torch.float32)
