"""The number that a thought about one response ends with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.dialog import SingleTurn, read_score
from dwrl_fast.encode import Group, response_contexts
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring.scorer import Kind, Progress, Runtime


@dataclass(frozen=True, slots=True)
class PointScorer:
    """The number of one greedy thought, or the mean of those of `votes` sampled ones; it is no log-probability.

    A response for which none can be read is judged wrongly: its score is infinite, on the wrong side.
    """

    thinks: ClassVar[bool] = True
    kind: ClassVar[Kind] = "number"
    runtime: Runtime
    temperature: float
    max_tokens: int

    @property
    def dialog(self) -> SingleTurn:
        return self.runtime.dialog

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[Group]:
        assert self.runtime.sampler is not None
        groups = sample_groups(
            rows,
            response_contexts(rows, self.dialog),
            self.dialog,
            self.runtime.sampler,
            votes,
            max_tokens=self.max_tokens,
            temperature=0.0 if votes == 1 else self.temperature,
            seed=step_seed(seed, "votes", votes),
            progress=progress,
        )
        for group in groups:
            best = min(group.ranks)
            group.verdicts = read_points(group, self.dialog)
            for rank, points in zip(group.ranks, group.verdicts, strict=True):
                read = [number for number in points if number is not None]
                group.unparsable += len(points) - len(read)
                wrong = -math.inf if rank == best else math.inf
                group.scores.append([sum(read) / len(read) if read else wrong])
        return groups


def read_points(group: Group, dialog: SingleTurn) -> list[list[float | None]]:
    """The number of every thought about every response; None where it cannot be read."""
    decode = dialog.tokenizer.decode
    return [
        [read_score(decode(sequence.ids[sequence.thought], skip_special_tokens=False)) for sequence in sequences]
        for sequences in group.sequences
    ]
