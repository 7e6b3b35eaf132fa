"""What every scorer is to training, evaluation and foreign callers, and what it needs of a loaded model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.sampling import Sampler

Progress = Callable[[int], None]
Kind = Literal["score", "number", "comparison"]
"""What one verdict of a model is: a score in nats, a number in text, or who won among two shown together."""


class Scorer(Protocol):
    """Scores every response of every row under a model as it stands."""

    thinks: ClassVar[bool]  # whether a thought precedes the score, so that votes mean something
    kind: ClassVar[Kind]  # under comparison a response's score depends on those that it is shown with

    @property
    def runtime(self) -> "Runtime": ...

    @property
    def dialog(self) -> Dialog | SingleTurn: ...

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[Group]:
        """Encoded groups in the order of `rows`, their `scores` filled: K lists of scores in nats, whose mean as
        probabilities is the response's; and their `verdicts`, where those are something else. `progress` counts
        responses.
        """
        ...


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model with all that it takes to run it; `sampler` is None where it cannot write. sampling_batch: the
    thoughts that a sampler writes at once.
    """

    model: Any
    dialog: Any
    compute: Compute
    layout: Layout
    sampler: Sampler | None = None
    sampling_batch: int = 256

    def run_batches(self, groups: Sequence[Group], read: Callable[[Batch], Tensor]) -> Iterator[tuple[Batch, Tensor]]:
        """What `read` gives for each micro-batch of `groups`, in an order of the layout's own: the model in its mode
        for scoring, without gradients, in the run's dtype. To be read to its end.
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.compute.autocast():
                for batch in self.layout.batches(groups):
                    yield batch, read(batch)
        finally:
            self.model.train(training)


def fill_scores(batch: Batch, scores: Tensor) -> None:
    """Write scores [S] back into the batch's groups."""
    values = iter(scores.detach().tolist())
    for group in batch.groups:
        group.scores = [[next(values) for _ in response] for response in group.sequences]


def fill_logprobs(batch: Batch, logprobs: Tensor) -> None:
    """Write the log-probs [T] of trained tokens back into the batch's groups, as the old ones."""
    parts = iter(logprobs.cpu().split(batch.lengths.tolist()))
    for group in batch.groups:
        group.old_logprobs = [[next(parts) for _ in response] for response in group.sequences]


def marginal_scores(groups: Sequence[Group]) -> Tensor:
    """Log of the mean of exp(score) over each response's scores: float64 [P, K], nan where a group has fewer
    responses.
    """
    rows = [
        [torch.tensor(each, dtype=torch.float64).logsumexp(0).item() - math.log(len(each)) for each in g.scores]
        for g in groups
    ]
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64)
