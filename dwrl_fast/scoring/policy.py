"""How likely a model writes a response: the score of a policy."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group, completion_groups
from dwrl_fast.models.adapters import adapted
from dwrl_fast.models.model import GenerativeModel, HeadInputs
from dwrl_fast.objectives.direct_preference import implicit_reward, sequence_sums
from dwrl_fast.scoring.scorer import Kind, Progress, Runtime, fill_logprobs, fill_scores


@dataclass(frozen=True, slots=True)
class Reference:
    """The model before its training; one with adapters is taken without them."""

    runtime: Runtime

    def fill_logprobs(self, groups: Sequence[Group]) -> None:
        """The log-probs of the trained tokens under it become the groups' `old_logprobs`."""
        model = self.runtime.model
        with model.reference() if adapted(model.lm) else nullcontext():
            for batch, logprobs in self.runtime.run_batches(groups, partial(_logprobs, model)):
                fill_logprobs(batch, logprobs)


@dataclass(frozen=True, slots=True)
class PolicyScorer:
    """log pi(y | x), summed over the response's tokens with its end-of-turn, times `beta`; with a reference, less that
    one's: the implicit reward. Without a reference `token_scores` are filled too. It has no thoughts, so votes change
    nothing.
    """

    thinks: ClassVar[bool] = False
    kind: ClassVar[Kind] = "score"
    runtime: Runtime
    reference: Reference | None = None
    beta: float = 1.0

    @property
    def dialog(self) -> Dialog | SingleTurn:
        return self.runtime.dialog

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[Group]:
        groups = completion_groups(rows, self.dialog)
        if self.reference is not None:
            self.reference.fill_logprobs(groups)
        for batch, logprob in self.runtime.run_batches(groups, partial(_logprobs, self.runtime.model)):
            if batch.old_logprob is None:
                sums = self.beta * sequence_sums(logprob, batch.lengths)
                fill_scores(batch, sums / batch.lengths)
                for group in batch.groups:
                    group.token_scores = group.scores
                fill_scores(batch, sums)
            else:
                fill_scores(batch, implicit_reward(logprob, batch.old_logprob, batch.lengths, self.beta))
            if progress is not None:
                progress(sum(len(group.sequences) for group in batch.groups))
        return groups


def _logprobs(model: GenerativeModel, batch: Batch) -> Tensor:
    return token_logprobs(model(batch, tokens=True), batch)


def token_logprobs(head: HeadInputs, batch: Batch) -> Tensor:
    """log pi of every trained token, [T], differentiable in the head's inputs."""
    return ops.linear_logprob(head.token, head.weight, batch.targets, bias=head.bias, softcap=head.softcap)
