"""The reward of a scalar model, read at the last token of prompt and response, or of a thought about them as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog
from dwrl_fast.encode import Group, plain_groups
from dwrl_fast.scoring.prefilled import PrefilledThoughts
from dwrl_fast.scoring.scorer import Kind, Progress, Runtime, fill_scores


@dataclass(frozen=True, slots=True)
class ScalarScorer:
    """r(x, y), or r(x, y, o) where one thought o is kept for each response: votes change nothing."""

    thinks: ClassVar[bool] = False
    kind: ClassVar[Kind] = "score"
    runtime: Runtime
    thoughts: PrefilledThoughts | None = None

    @property
    def dialog(self) -> Dialog:
        return self.runtime.dialog

    def groups(self, rows: Sequence[Preference], progress: Progress | None) -> list[Group]:
        """What the model reads; `progress` counts the responses that thoughts are written for."""
        return plain_groups(rows, self.dialog) if self.thoughts is None else self.thoughts.groups(rows, progress)

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[Group]:
        groups = self.groups(rows, progress)
        for batch, rewards in self.runtime.run_batches(groups, self.runtime.model):
            fill_scores(batch, rewards)
            if progress is not None and self.thoughts is None:  # else it was the writing that took the time
                progress(sum(len(group.sequences) for group in batch.groups))
        return groups
