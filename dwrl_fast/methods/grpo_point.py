"""`grpo-point`: a thought about one response that ends with a number between `<s>` and `</s>`, rewarded by the share of
the other responses' numbers that it is on the right side of (docs/method.md, 3).
"""

from collections.abc import Sequence

from dwrl_fast.data import Preference
from dwrl_fast.dialog import read_score
from dwrl_fast.encode import Group, Request, read_thoughts
from dwrl_fast.methods.grpo import GroupRelative
from dwrl_fast.objectives.group_relative import point_rewards


class PointwiseGroupRelative(GroupRelative):
    """A number for each response, rewarded by comparison with the numbers of the other responses."""

    name = "grpo-point"
    summary = "a thought about one response that ends with a number, rewarded by comparison with the other responses"
    template = "pointwise"
    verdict = "number after a thought"

    def requests(self, rows: Sequence[Preference], seed: int) -> list[Request]:
        """Leaves out rows whose responses all tie, because no number can be right for them."""
        return super().requests([row for row in rows if len(set(row.ranks)) != 1], seed)

    def reward(self, requests: Sequence[Request], groups: list[Group]) -> tuple[list[Group], int]:
        points = [read_thoughts(group, self.dialog, read_score) for group in groups]
        unread = sum(each.count(None) for some in points for each in some)
        rewarded = zip(groups, points, strict=True)
        return [group.with_rewards(point_rewards(some, group.ranks)) for group, some in rewarded], unread
