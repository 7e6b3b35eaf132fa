"""The row functions in C++ (csrc/row_pass.cpp, csrc/policy_loss.cpp), with the interface of `kernels/rows.py`.

The gradient always overwrites the logits. Shapes: C rows of a chunk, V vocabulary.
"""

import torch
from torch import Tensor


def policy_rows(logits: Tensor, gradient: Tensor | None, *rest: Tensor | float | None) -> Tensor:
    """[3, C]: logprob, entropy, dLoss/dlogprob. With `gradient` the logits are overwritten by dLoss/d(head output)."""
    return torch.ops.dwrl_fast.policy_rows_(logits, *rest, gradient is not None)


def logprob_rows(logits: Tensor, targets: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """[2, C]: logprob, entropy. The logits are overwritten."""
    return torch.ops.dwrl_fast.logprob_rows_(logits, targets, temperature, softcap)


def logprob_rows_grad(logits: Tensor, gradient: Tensor, *rest: Tensor | float | None) -> None:
    """Overwrites the logits by the gradient of sum grad_logprob logprob + grad_entropy entropy."""
    torch.ops.dwrl_fast.logprob_rows_grad_(logits, *rest)


def policy_loss_rows(*args: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], logprob with NaN in untrained rows [T], dLoss/dlogprob [T], stats [10] float64."""
    return torch.ops.dwrl_fast.policy_loss_rows(*args)
