"""What methods share that judge two responses in a thought that ends with the verdict."""

from collections.abc import Sequence

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.dialog import read_choice
from dwrl_fast.encode import Group, Request, comparison_requests, drawn_orders, read_thoughts
from dwrl_fast.methods.generative import GenerativeMethod
from dwrl_fast.objectives.group_relative import choice_rewards


class PairwiseVerdicts(GenerativeMethod):
    """Every pair of responses that do not tie is shown in one order, drawn from the seed. A right verdict has reward
    1.
    """

    template = "pairwise"
    verdict = "choice after a thought"

    def requests(self, rows: Sequence[Preference], seed: int) -> list[Request]:
        return comparison_requests(rows, drawn_orders(rows, step_seed(seed, "order", 0)), self.question)

    def reward(self, requests: Sequence[Request], groups: list[Group]) -> tuple[list[Group], int]:
        found, unread = [], 0
        for request, group in zip(requests, groups, strict=True):
            choices = read_thoughts(group, self.question, read_choice)
            unread += sum(each.count(None) for each in choices)
            right = [comparison.right or 0 for comparison in request.comparisons]
            found.append(group.with_rewards([*map(choice_rewards, choices, right)]))
        return found, unread
