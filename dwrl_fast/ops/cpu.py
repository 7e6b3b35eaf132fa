"""The C++ row pass (csrc/row_pass.cpp, csrc/policy_loss.cpp) and its fakes. Logits become their gradient in place."""

import torch
from torch import Tensor


def policy_rows(logits: Tensor, gradient: Tensor | None, *rest: Tensor | float | None) -> Tensor:
    return torch.ops.dwrl_fast.policy_rows_(logits, *rest, gradient is not None)


def logprob_rows(logits: Tensor, targets: Tensor, temperature: float, softcap: float | None) -> Tensor:
    return torch.ops.dwrl_fast.logprob_rows_(logits, targets, temperature, softcap)


def logprob_rows_grad(logits: Tensor, gradient: Tensor, *rest: Tensor | float | None) -> None:
    torch.ops.dwrl_fast.logprob_rows_grad_(logits, *rest)


def policy_loss_rows(*args: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.dwrl_fast.policy_loss_rows(*args)
