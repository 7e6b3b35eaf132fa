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

    sequences: K lists of N. thoughts: K lists of N, those that stand in the sequences; empty where none was sampled.
    labels: for each sequence at whose end a label is trained, the right one, the template's first (0) or second (1).
    """

    preference: Preference
    sequences: list[list[TokenSequence]]
    thoughts: list[list[Thought]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of all responses, whether or not any of them tie."""
        return self.preference.ranks or tuple(range(1, len(self.preference.responses) + 1))

    @property
    def flat(self) -> list[TokenSequence]:
        """All K N sequences, one after another."""
        return [sequence for response in self.sequences for sequence in response]

    @property
    def longest(self) -> int:
        """The tokens of its longest sequence."""
        return max(len(sequence.ids) for sequence in self.flat)

    @property
    def rewards(self) -> list[list[float]]:
        """Those of its thoughts: K lists of N; K empty ones where they have none."""
        return [[thought.reward for thought in some if thought.reward is not None] for some in self.thoughts]

    def with_logprobs(self, logprobs: Sequence[Sequence[list[float]]]) -> "Group":
        """The same with these log-probs of its trained tokens, in nats: K lists of N lists."""
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
        """The same with these rewards of its thoughts: K lists of N."""
        return dataclasses.replace(
            self,
            thoughts=[
                [dataclasses.replace(one, reward=reward) for one, reward in zip(some, given, strict=True)]
                for some, given in zip(self.thoughts, rewards, strict=True)
            ],
        )
