"""One preference group after encoding."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from dwrl_fast.data import Preference
from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode.thought import Thought


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """K responses, or K comparisons of two of them, with N sequences each. Groups are equal only to themselves.

    sequences: K lists of N. thoughts: K lists of N, the thoughts in these sequences; empty if none was sampled. labels:
    for each sequence that ends with a trained label, the right label: the template's first (0) or second (1).
    """

    preference: Preference
    sequences: list[list[TokenSequence]]
    thoughts: list[list[Thought]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of all responses; always filled, also without ties."""
        return self.preference.ranks or tuple(range(1, len(self.preference.responses) + 1))

    @property
    def flat(self) -> list[TokenSequence]:
        """All K N sequences in one list."""
        return [sequence for response in self.sequences for sequence in response]

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return max(len(sequence.ids) for sequence in self.flat)

    @property
    def rewards(self) -> list[list[float]]:
        """The rewards of the thoughts: K lists of N; K empty lists if there are none."""
        return [[thought.reward for thought in some if thought.reward is not None] for some in self.thoughts]

    def with_logprobs(self, logprobs: Sequence[Sequence[list[float]]]) -> "Group":
        """A copy with these log-probs of the trained tokens, in nats: K lists of N lists."""
        if not self.thoughts:
            thoughts = [
                [Thought(one.ids[one.thought], new, True) for one, new in zip(some, fresh, strict=True)]
                for some, fresh in zip(self.sequences, logprobs, strict=True)
            ]
        else:
            thoughts = [
                [dataclasses.replace(one, logprobs=new) for one, new in zip(some, fresh, strict=True)]
                for some, fresh in zip(self.thoughts, logprobs, strict=True)
            ]
        return dataclasses.replace(self, thoughts=thoughts)

    def with_rewards(self, rewards: Sequence[Sequence[float]]) -> "Group":
        """A copy with these rewards of the thoughts: K lists of N."""
        return dataclasses.replace(
            self,
            thoughts=[
                [dataclasses.replace(one, reward=reward) for one, reward in zip(some, given, strict=True)]
                for some, given in zip(self.thoughts, rewards, strict=True)
            ],
        )
