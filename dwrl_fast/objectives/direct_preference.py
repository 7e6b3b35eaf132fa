"""Direct preference optimisation (DPO): the implicit reward of a whole continuation.

Shapes: T tokens of S sequences, one after another.
"""

import torch
from torch import Tensor


def sequence_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """The sum over the tokens of each sequence, [T] -> [S]. lengths: [S] int64, in the order of the sequences."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def implicit_reward(logprob: Tensor, reference: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """beta (log pi(y | x) - log pi_ref(y | x)) of every sequence, [S] in nats.

    logprob, reference: [T], of each token under the policy and under the reference model. lengths: [S] int64.
    Source: Rafailov et al. 2023, Eq. 5, without the partition function, which cancels between responses to one prompt.
    """
    return beta * sequence_sums(logprob - reference, lengths)
