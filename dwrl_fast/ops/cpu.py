"""The C++ row pass (csrc/row_pass.cpp, csrc/policy_loss.cpp) and its fakes. Logits become their gradient in place."""

from typing import Any

import torch
from torch import Tensor

from dwrl_fast.ops import extension
from dwrl_fast.ops.products import wide
from dwrl_fast.ops.stats import empty_stats

if extension.problem():
    raise ImportError(extension.problem())


def policy_rows(logits: Tensor, gradient: Tensor | None, *rest: Tensor | float | None) -> Tensor:
    return torch.ops.dwrl_fast.policy_rows_(logits, *rest, gradient is not None)


def logprob_rows(logits: Tensor, targets: Tensor, temperature: float, softcap: float | None) -> Tensor:
    return torch.ops.dwrl_fast.logprob_rows_(logits, targets, temperature, softcap)


def logprob_rows_grad(logits: Tensor, gradient: Tensor, *rest: Tensor | float | None) -> None:
    torch.ops.dwrl_fast.logprob_rows_grad_(logits, *rest)


def policy_loss_rows(*args: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.dwrl_fast.policy_loss_rows(*args)


@torch.library.register_fake("dwrl_fast::policy_rows_")
def _(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=wide(logits.dtype))


@torch.library.register_fake("dwrl_fast::logprob_rows_")
def _(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty((2, logits.shape[0]), dtype=wide(logits.dtype))


@torch.library.register_fake("dwrl_fast::logprob_rows_grad_")
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("dwrl_fast::policy_loss_rows")
def _(logprob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return logprob.new_empty(()), torch.empty_like(logprob), torch.empty_like(logprob), empty_stats(logprob)
