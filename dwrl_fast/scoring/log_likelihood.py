"""The score of a policy: the log-likelihood of a response."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from dwrl_fast.batching.batch import Batch
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, completion_groups
from dwrl_fast.errors import ModelError
from dwrl_fast.log import warn_once
from dwrl_fast.models.adapters import adapted
from dwrl_fast.models.pretrained import CARD
from dwrl_fast.objectives.direct_preference import implicit_reward, sequence_sums
from dwrl_fast.sampling import Limits
from dwrl_fast.scoring.judging import Judging, Progress
from dwrl_fast.scoring.runtime import Runtime, load_runtime
from dwrl_fast.scoring.scored import ScoredGroup


class PolicyJudging(Judging):
    """beta log pi(y | x), summed over the response's tokens including its end-of-turn. If the card has a beta, the
    value of the frozen start model is subtracted, which gives the implicit reward. Without a start model `token_scores`
    are also filled. There are no thoughts, so votes have no effect.
    """

    kind = "score"

    def __init__(self, runtime: Runtime, card: dict[str, Any]):
        super().__init__(runtime, card)
        self.beta: float = card.get("beta", 1.0)
        self.start = _load_start(runtime, card) if "beta" in card else None
        self.switches_model = self.start is runtime

    def with_start_logprobs(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with the log-probs of their trained tokens under the frozen start model; for a model with
        adapters, that is the model without them.
        """
        assert self.start is not None
        model = self.start.model
        with model.without_adapters() if adapted(model.lm) else nullcontext():
            logprobs = self.start.logprobs(groups)
        return [group.with_logprobs(each) for group, each in zip(groups, logprobs, strict=True)]

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[ScoredGroup]:
        groups = completion_groups(rows, self.dialog)
        asked = groups if self.start is None else self.with_start_logprobs(groups)
        found = self.runtime.run_batches(asked, self._read, progress)
        return [
            ScoredGroup(group, scores, token_scores=[each[0] for each in token_scores])
            for group, (scores, token_scores) in zip(groups, found, strict=True)
        ]

    def _read(self, batch: Batch) -> list[tuple[list[list[float]], list[list[float]]]]:
        head = self.runtime.model(batch, tokens=True)
        logprob = head.logprobs(head.token, batch.targets)
        if batch.old_logprob is not None:
            rewards = implicit_reward(logprob, batch.old_logprob, batch.lengths, self.beta)
            return [(scores, []) for scores in batch.by_sequence(rewards.tolist())]
        sums = self.beta * sequence_sums(logprob, batch.lengths)
        both = (batch.by_sequence(each.tolist()) for each in (sums, sums / batch.lengths))
        return list(zip(*both, strict=True))


def _load_start(runtime: Runtime, card: dict[str, Any]) -> Runtime | None:
    """The model at the start of the run: the model itself without its adapters, if it has any; otherwise it is loaded
    again (at the start of a run, when a run is resumed, and for evaluation). None, with a warning, if it is not found.
    """
    if adapted(runtime.model.lm):
        return runtime
    try:
        if (source := card.get("reference")) is None:
            raise ModelError(f"{CARD} does not name it: it is on the machine that uploaded this model.")
        named = source["model_name_or_path"], source["model_config"], source["seed"]
        start = load_runtime(
            *(card, *named, runtime.dialog, runtime.compute, runtime.layout, Limits(1, 1.0)),
            frozen=True,
            ranks=runtime.ranks,
            offload=runtime.sharded is not None and runtime.sharded.offload,
        )
    except ModelError as error:
        warn_once(
            "the model that this one was trained from is not found, so the scores are beta log pi(y | x), without "
            f"the reference's term; accuracy and margin are then those of a different reward.\n  {error}"
        )
        return None
    return start
