"""Group-relative policy optimisation (GRPO): rewards of the methods that sample verdicts, and their advantages.

The loss itself is `ops.linear_policy_loss`. Shapes: C contexts of a preference group, N thoughts of each, K responses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def group_advantage(rewards: Tensor) -> Tensor:
    """(R - mean) / (std + 1e-4) over the last dimension, the thoughts of one context. Shape and dtype of `rewards`.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2. The standard deviation divides by N - 1. The 1e-4 is as in
    common implementations. Equal rewards, and a single thought, get 0.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    spread = rewards.std(-1, keepdim=True) if rewards.shape[-1] > 1 else torch.zeros_like(centred)
    return centred / (spread + 1e-4)


def choice_rewards(choices: Sequence[int | None], right: int) -> list[float]:
    """1 for each verdict that names the better response, `right`; 0 for another, and for None, which is unreadable.

    This is the reward of J1-pair, RM-R1 and RRM. Returns one number per verdict.
    """
    return [float(choice == right) for choice in choices]


def point_rewards(points: Sequence[Sequence[float | None]], ranks: Sequence[int]) -> list[list[float]]:
    """The reward of every thought that gave one response a number (J1-point: Whitehouse et al. 2025).

    points: for each of K responses the number of each of its thoughts, None if none could be read. ranks: K, the
    smallest is the best. A thought is compared with every thought about a response of another rank. Its reward is the
    share of comparisons in which its number is on the right side; equal numbers are not. A thought without a number has
    reward 0, and a comparison with a thought without a number is lost. Shaped like `points`.
    """
    return [
        [_share_beaten(number, [(other, ranks[k] < ranks[j]) for j, row in enumerate(points) for other in row
                                if ranks[j] != ranks[k]]) for number in numbers]
        for k, numbers in enumerate(points)
    ]  # fmt: skip


def _share_beaten(number: float | None, others: list[tuple[float | None, bool]]) -> float:
    """others: each number to compare with, and whether `number` has to be above it."""
    if number is None or not others:
        return 0.0
    won = [other is not None and (number > other if above else number < other) for other, above in others]
    return sum(won) / len(won)
