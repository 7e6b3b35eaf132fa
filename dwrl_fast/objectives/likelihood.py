"""Preference likelihoods: functions f of the log-marginal scores L [P, K] of K responses, giving a loss [P] in nats.

Every data format is one such function, which the operators take as it is (docs/method.md, 2.1). The best stands first.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Likelihood = Callable[[Tensor], Tensor]


def bradley_terry(margin: Tensor) -> Likelihood:
    """Pairs: -log sigmoid(L+ - L- - margin). margin [P] in nats; 0 is the papers' likelihood."""

    def loss(marginals: Tensor) -> Tensor:
        if marginals.shape[-1] != 2:
            raise ValueError(
                f"a Bradley-Terry pair has 2 responses, but marginals [P, K] have shape {tuple(marginals.shape)}"
            )
        return -F.logsigmoid(marginals[:, 0] - marginals[:, 1] - margin)

    return loss
