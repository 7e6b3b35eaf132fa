"""`grpo-point`: a thought about one response that ends with a number between `<s>` and `</s>`, rewarded by how many of
the numbers of the other responses it is on the right side of (docs/method.md, 3).
"""

from collections.abc import Sequence
from typing import Any

from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, response_contexts
from dwrl_fast.methods.grpo import GroupRelative
from dwrl_fast.objectives.group_relative import point_rewards
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring import PointScorer, Progress, Runtime, Scorer, read_points


class PointwiseGroupRelative(GroupRelative):
    name = "grpo-point"
    template = "pointwise"

    @classmethod
    def make_scorer(cls, runtime: Runtime, card: dict[str, Any]) -> Scorer:
        return PointScorer(runtime, card["temperature"], card["max_completion_length"])

    def sample(self, rows: Sequence[Preference], seed: int, progress: Progress) -> list[Group]:
        kept = [row for row in rows if len(set(row.ranks)) != 1]  # of responses that all tie nothing can be right
        groups = sample_groups(
            kept,
            response_contexts(kept, self.dialog),
            self.dialog,
            self.sampler,
            self.config.num_generations,
            max_tokens=self.config.max_completion_length,
            temperature=self.config.temperature,
            seed=seed,
            progress=progress,
        )
        for group in groups:
            points = read_points(group, self.dialog)
            group.unparsable = sum(row.count(None) for row in points)
            group.rewards = point_rewards(points, group.ranks)
        return groups
