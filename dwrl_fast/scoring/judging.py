"""What every way of giving a verdict is to training, to evaluation and to the public `Scorer`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Request
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring.runtime import Runtime
from dwrl_fast.scoring.scored import ScoredGroup

Progress = Callable[[int], None]
Kind = Literal["score", "number", "comparison"]
"""What one verdict of a model is: a score in nats, a number in text, or who won among two shown together."""


class Judging(ABC):
    """Scores every response of every row under a model as it stands.

    thinks: whether a thought precedes the score, so that votes mean something. kind: under comparison a response's
    score depends on those that it is shown with. switches_model: whether scoring switches adapters off and on, so that
    no other call may run meanwhile. card: as `Method.card` gave it.
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
        """In the order of `rows`. votes: 1 is one greedy thought, more are sampled. `progress` counts responses."""

    def sample(
        self,
        requests: Sequence[Request],
        votes: int,
        seed: int,
        progress: Progress | None = None,
        normalization: str | None = None,
    ) -> list[Group]:
        """One group a request with `votes` thoughts a context, which `progress` counts; a single one is greedy. With
        `normalization` the thoughts come with their scores, where the sampler can give them.
        """
        assert self.runtime.sampler is not None
        return sample_groups(
            requests,
            self.dialog,
            self.runtime.sampler,
            votes,
            max_tokens=self.card["max_completion_length"],
            temperature=0.0 if votes == 1 else self.card["temperature"],
            seed=step_seed(seed, "votes", votes),
            progress=progress,
            normalization=normalization,
        )
