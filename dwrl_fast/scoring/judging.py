"""The interface of all kinds of verdicts, for training, evaluation and the public `Scorer`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Request
from dwrl_fast.models.model import SHORTEN, refuse_past_positions
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring.runtime import Runtime
from dwrl_fast.scoring.scored import ScoredGroup

Progress = Callable[[int], None]
Kind = Literal["score", "number", "comparison"]
"""The kind of a verdict: a score in nats, a number in text, or the winner of two responses shown together."""


class Judging(ABC):
    """Scores every response of every row with the current weights of a model.

    thinks: whether a thought precedes the score, so that votes have an effect. kind: with comparisons, the score of a
    response depends on the other response shown. switches_model: whether scoring switches adapters off and on, so that
    no other call may run at the same time. card: from `Method.card`.
    """

    thinks: ClassVar[bool] = False
    switches_model: bool = False
    kind: ClassVar[Kind]

    def __init__(self, runtime: Runtime, card: dict[str, Any]):
        self.runtime, self.card = runtime, card
        self.dialog = runtime.dialog

    @abstractmethod
    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[ScoredGroup]:
        """The scored groups, in the order of `rows`. votes: 1 is one greedy thought, more are sampled. `progress`
        counts responses.
        """

    def sample(
        self,
        requests: Sequence[Request],
        votes: int,
        seed: int,
        progress: Progress | None = None,
        normalization: str | None = None,
    ) -> list[Group]:
        """One group per request with `votes` thoughts per context; a single thought is greedy. `progress` counts
        contexts. With `normalization` the thoughts have scores, if the sampler can give them.

        Raises ModelError, before anything is sampled, if the model cannot compute a context with the longest thought.
        """
        assert self.runtime.sampler is not None
        max_tokens: int = self.card["max_completion_length"]
        contexts = (context for request in requests for context in request.contexts)
        longest = max((len(self.dialog.sequence(context, []).ids) for context in contexts), default=0)
        refuse_past_positions(self.runtime.model, longest + max_tokens, f"{SHORTEN}, or lower max_completion_length")
        return sample_groups(
            requests,
            self.dialog,
            self.runtime.sampler,
            votes,
            max_tokens=max_tokens,
            temperature=0.0 if votes == 1 else self.card["temperature"],
            seed=step_seed(seed, "votes", votes),
            progress=progress,
            normalization=normalization,
        )
