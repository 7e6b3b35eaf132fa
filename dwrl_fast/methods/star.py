"""What `star-sft`, `star-dpo` and `star-rationalizer` share: of the thoughts that were sampled, those are trained whose
verdict says that they should be.

A rollout batch is a round: its thoughts are sampled by the model as it stands, then it is trained on what is kept. The
log-probs that are trained are those of the model itself, whatever temperature the thoughts were sampled with.
"""

from collections.abc import Sequence

from torch import Tensor

from dwrl_fast.batching.batch import Batch
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group
from dwrl_fast.methods.generative import thought_figures
from dwrl_fast.methods.verdicts import Asked, PairwiseVerdicts
from dwrl_fast.models.model import HeadInputs
from dwrl_fast.scoring.policy import token_logprobs

Places = list[list[int]]  # for each comparison of a group, those among its thoughts


class SelfTaught(PairwiseVerdicts):
    @property
    def phases(self) -> tuple[str, ...]:
        return ("thought",)

    def token_logprobs(self, head: HeadInputs, batch: Batch) -> Tensor:
        return token_logprobs(head, batch)

    def judged(self, group: Group, right: bool) -> Places:
        """The thoughts that judge rightly, or the others; a verdict that cannot be read is wrong. Where thoughts cut at
        the limit are masked, they are neither.
        """
        cut = self.config.truncated_thoughts == "mask"
        return [
            [i for i, (reward, end) in enumerate(zip(rewards, ended, strict=True))
             if (reward == 1) == right and (end or not cut)]
            for rewards, ended in zip(group.rewards, group.ended, strict=True)
        ]  # fmt: skip

    def figures(
        self, rows: Sequence[Preference], asked: Asked, sampled: Sequence[Group], kept: Sequence[Group]
    ) -> dict[str, float]:
        """What is worth logging of a round. Comparisons are counted: those that tie and are not asked, those asked, and
        those with a thought that is trained.
        """
        pairs = sum(len(row.responses) * (len(row.responses) - 1) // 2 for row in rows)
        comparisons = sum(len(some) for _, some in asked)
        thoughts, used = (sum(len(group.flat) for group in groups) for groups in (sampled, kept))
        logs = {
            "tied_comparisons": float(pairs - comparisons),
            "comparisons": float(comparisons),
            "kept_comparisons": float(sum(len(group.sequences) for group in kept)),
            "kept_thoughts": float(used),
            "dropped_thoughts": float(thoughts - used),
        }
        if sampled:
            logs |= thought_figures(sampled)
            logs["unparsable"] = sum(group.unparsable for group in sampled) / thoughts
            logs["right_thoughts"] = sum(sum(each) for group in sampled for each in group.rewards) / thoughts
        return logs


def select(group: Group, places: Places) -> list[Group]:
    """The group with nothing but the thoughts at `places`, and no comparison without one; no group where none is left.

    A list, to be chained.
    """
    kept = [(c, some) for c, some in enumerate(places) if some]
    if not kept:
        return []
    return [
        Group(
            group.preference,
            [[group.sequences[c][i] for i in some] for c, some in kept],
            old_logprobs=[[group.old_logprobs[c][i] for i in some] for c, some in kept] if group.old_logprobs else [],
            ended=[[group.ended[c][i] for i in some] for c, some in kept],
            rewards=[[group.rewards[c][i] for i in some] for c, some in kept],
        )
    ]
