"""Self-taught reasoners, what they share: a rollout batch is a round. Thoughts about comparisons are sampled by the
model as it stands, then it is trained on what is kept. The log-probs that are trained are those of the model itself,
whatever temperature the thoughts were sampled with.
"""

import dataclasses
from collections.abc import Sequence

from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Request
from dwrl_fast.methods.pairwise import PairwiseVerdicts

Places = list[list[int]]  # for each comparison of a group, those among its thoughts


class SelfTaught(PairwiseVerdicts):
    """What is sampled is judged by its verdict, and only part of it is trained."""

    selects = True

    @property
    def phases(self) -> tuple[str, ...]:
        return ("thought",)

    def judged(self, group: Group, right: bool) -> Places:
        """The thoughts that judge rightly, or the others; a verdict that cannot be read is wrong. Where thoughts cut at
        the limit are masked, they are neither.
        """
        cut = self.config.truncated_thoughts == "mask"
        return [
            [i for i, thought in enumerate(some) if (thought.reward == 1) == right and (thought.ended or not cut)]
            for some in group.thoughts
        ]

    def keep(self, groups: list[Group], seed: int) -> list[Group]:
        """Those that judge rightly."""
        return [one for group in groups for one in select(group, self.judged(group, right=True))]

    def figures(
        self, rows: Sequence[Preference], requests: Sequence[Request], sampled: list[Group], kept: list[Group],
        unread: int,
    ) -> dict[str, float]:  # fmt: skip
        """Comparisons are counted: those that tie and are not asked, those asked, and those with a thought that is
        trained.
        """
        pairs = sum(len(row.responses) * (len(row.responses) - 1) // 2 for row in rows)
        comparisons = sum(len(request.comparisons) for request in requests)
        thoughts, used = (sum(len(group.flat) for group in groups) for groups in (sampled, kept))
        logs = {
            "tied_comparisons": float(pairs - comparisons),
            "comparisons": float(comparisons),
            "kept_comparisons": float(sum(len(group.sequences) for group in kept)),
            "kept_thoughts": float(used),
            "dropped_thoughts": float(thoughts - used),
        }
        if sampled:
            logs |= super().figures(rows, requests, sampled, kept, unread)
            logs["unparsable"] = unread / thoughts
            logs["right_thoughts"] = sum(sum(some) for group in sampled for some in group.rewards) / thoughts
        return logs


def select(group: Group, places: Places) -> list[Group]:
    """The group with nothing but the thoughts at `places`, and no comparison without one; no group where none is left.

    A list, to be chained.
    """
    kept = [(c, some) for c, some in enumerate(places) if some]
    if not kept:
        return []
    sequences = [[group.sequences[c][i] for i in some] for c, some in kept]
    return [
        dataclasses.replace(
            group, sequences=sequences, thoughts=[[group.thoughts[c][i] for i in some] for c, some in kept]
        )
    ]
