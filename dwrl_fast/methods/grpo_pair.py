"""`grpo-pair`: a thought about both responses that ends with `<answer>[[A]]</answer>` or B, rewarded if it is right
(docs/method.md, 3). Every pair is shown in one order, drawn from the seed.
"""

from dwrl_fast.methods.grpo import GroupRelative
from dwrl_fast.methods.pairwise import PairwiseVerdicts


class PairwiseGroupRelative(PairwiseVerdicts, GroupRelative):
    """A verdict on two responses, rewarded if it is right."""

    name = "grpo-pair"
    summary = "a thought about both responses that ends with a verdict, rewarded if the verdict is correct"
    options = GroupRelative.options
