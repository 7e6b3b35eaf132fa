"""What self-taught reasoners share: a rollout batch is a round. The current model samples thoughts about comparisons,
and is then trained on those that are kept. The trained log-probs have temperature 1, whatever the sampling temperature
of the thoughts.
"""

import dataclasses
from collections.abc import Sequence

from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Request
from dwrl_fast.methods.pairwise import PairwiseVerdicts

Places = list[list[int]]  # for each comparison of a group, indices of its thoughts


class SelfTaught(PairwiseVerdicts):
    """Sampled thoughts are selected by their verdicts; only some of them are trained."""

    selects = True

    @property
    def phases(self) -> tuple[str, ...]:
        return ("thought",)

    def judged(self, group: Group, right: bool) -> Places:
        """The thoughts with a right verdict (`right`), or the others. An unreadable verdict is wrong. If thoughts cut
        at the limit are masked, they are in neither set.
        """
        cut = self.config.truncated_thoughts == "mask"
        return [
            [i for i, thought in enumerate(some) if (thought.reward == 1) == right and (thought.ended or not cut)]
            for some in group.thoughts
        ]

    def keep(self, groups: list[Group], seed: int) -> list[Group]:
        """The thoughts with a right verdict."""
        return [one for group in groups for one in select(group, self.judged(group, right=True))]

    def figures(
        self, rows: Sequence[Preference], requests: Sequence[Request], sampled: list[Group], kept: list[Group],
        unread: int,
    ) -> dict[str, float]:  # fmt: skip
        """Counts of comparisons: tied ones, which are not asked about; those asked about; and those with a trained
        thought.
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
    """The group with only the thoughts at `places`, without comparisons that have none; an empty list if no thought is
    left.

    Returns a list, so that results can be chained.
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
