"""One preference group after encoding: K responses with N sequences each, and what is known of them so far."""

from dataclasses import dataclass, field

from torch import Tensor

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Sequence


@dataclass(slots=True)
class Group:
    """One encoded preference group.

    sequences: K lists of N sequences.
    old_logprobs: K lists of N float32 tensors [|o|], the sampling policy's; empty where nothing is sampled.
    ended: K lists of N flags: whether the thought closed itself within the limit.
    scores: K lists of N scores in nats, as last computed (for the log of thoughts).
    verdicts: where they are no scores in nats, what each thought says, or what is read without one: K lists of N
    numbers; of methods that compare a list for each comparison, 1 where the response shown first wins, 0 where the
    other does, a probability between; None where it cannot be read.
    rewards: K lists of N rewards, for methods that reward what is sampled.
    unparsable: verdicts that could not be read. first_shares: for each comparison, the share of its verdicts for A.
    right: for each sequence at whose end a label is trained, the right one, the template's first (0) or second (1).
    token_scores: K lists of N scores a token, where a score is a continuation's log-prob.

    Methods that compare responses hold one list of sequences for each comparison in place of each response.
    """

    preference: Preference
    sequences: list[list[Sequence]]
    old_logprobs: list[list[Tensor]] = field(default_factory=list)
    ended: list[list[bool]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    verdicts: list[list[float | None]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    unparsable: int = 0
    right: list[int] = field(default_factory=list)
    first_shares: list[float] = field(default_factory=list)
    token_scores: list[list[float]] = field(default_factory=list)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of all K responses, whether or not any of them tie."""
        return self.preference.ranks or tuple(range(1, len(self.preference.responses) + 1))

    @property
    def flat(self) -> list[Sequence]:
        return [sequence for response in self.sequences for sequence in response]

    @property
    def longest(self) -> int:
        return max(len(sequence.ids) for sequence in self.flat)
