"""log p(Yes) after a thought: the score of a generative preference model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch
from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog
from dwrl_fast.encode import Group, response_contexts
from dwrl_fast.models.model import HeadInputs
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring.scorer import Kind, Progress, Runtime, fill_scores


@dataclass(frozen=True, slots=True)
class GenerativeScorer:
    """s = log p(Yes | x, y, o) after one greedy thought, or after each of `votes` sampled ones."""

    thinks: ClassVar[bool] = True
    kind: ClassVar[Kind] = "score"
    runtime: Runtime
    normalization: str
    temperature: float
    max_tokens: int

    @property
    def dialog(self) -> Dialog:
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
        for batch, scores in self.runtime.run_batches(groups, self._scores):
            fill_scores(batch, scores)
        return groups

    def _scores(self, batch: Batch) -> Tensor:
        return read_scores(self.runtime.model(batch, tokens=False), self.dialog, self.normalization)[0]


def read_scores(
    head: HeadInputs, dialog: Dialog, normalization: str, *, mass: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scores s [S] in nats, differentiable in the head's inputs, and if asked for the label mass p(Yes) + p(No) [S]."""
    labels = (head.score, head.weight, dialog.yes_id, dialog.no_id)
    if mass:
        return ops.yes_no_logprob(
            *labels, normalization=normalization, bias=head.bias, softcap=head.softcap, return_mass=True
        )
    return ops.yes_no_logprob(*labels, normalization=normalization, bias=head.bias, softcap=head.softcap), None
