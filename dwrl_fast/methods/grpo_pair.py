"""`grpo-pair`: a thought about both responses that ends with `<answer>[[A]]</answer>` or B, rewarded where it is right
(docs/method.md, 3). Every pair is shown in one order, drawn from the seed.
"""

from collections.abc import Sequence

from dwrl_fast.data import Preference
from dwrl_fast.encode import Group
from dwrl_fast.methods.grpo import GroupRelative
from dwrl_fast.methods.verdicts import PairwiseVerdicts
from dwrl_fast.scoring import Progress


class PairwiseGroupRelative(PairwiseVerdicts, GroupRelative):
    name = "grpo-pair"

    def sample(self, rows: Sequence[Preference], seed: int, progress: Progress) -> list[Group]:
        return self.sample_verdicts(self.ask(rows, seed), seed, progress)
