"""Implementations of peers for the same results, each by name, or the reason why it cannot run here."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [T, H], weight [V, H], targets [T] -> [T]
NEEDS_CUDA = "its kernels need a CUDA device"
SLOW = {"F.linear_cross_entropy, chunked"}  # takes minutes on a CPU, because its default chunks have one or two rows


def plain_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition, over whole logits."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def chunked_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Plain PyTorch, 256 rows at a time, recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    chunks = zip(hidden.split(256), targets.split(256), strict=True)
    return torch.cat([checkpoint(plain_logprob, h, weight, t, use_reentrant=False) for h, t in chunks])


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunked: bool = False) -> Tensor:
    """PyTorch's implementation, unchunked or in chunks of its default size."""
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def _cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce")


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ())[0]


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, targets)


def _liger_scaled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    return -module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def _quack(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return -linear_cross_entropy_func(hidden, weight, None, targets, reduction="none")


def logprob_peers() -> list[tuple[str, Logprob | None, str]]:
    """(name, function or None, why not) of every peer implementation."""
    cuda = torch.cuda.is_available()
    return [
        ("plain PyTorch", plain_logprob, ""),
        ("plain PyTorch, chunked", chunked_logprob, ""),
        ("F.linear_cross_entropy", torch_linear_cross_entropy, ""),
        ("F.linear_cross_entropy, chunked", partial(torch_linear_cross_entropy, chunked=True), ""),
        ("TRL chunked log-prob", _trl, ""),
        ("Liger fused_linear_cross_entropy", _liger if cuda else None, NEEDS_CUDA),
        ("Liger fused_linear_scaled_cross_entropy", _liger_scaled, ""),
        ("cut-cross-entropy", _cce if cuda else None, NEEDS_CUDA),
        ("QuACK", _quack if cuda else None, NEEDS_CUDA),
    ]


def liger_grpo(
    hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantage: Tensor, token_weight: Tensor,
    *, compiled: bool = False,
) -> Tensor:  # fmt: skip
    """Liger's chunked GRPO loss, as sequences of one token each so that the advantage is per token."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, chunk_size=256, loss_type="dr_grpo", max_completion_length=1
    )
    return loss(
        hidden[:, None], weight, targets[:, None], (token_weight != 0).float()[:, None], advantage,
        old_per_token_logps=old[:, None],
    )[0]  # fmt: skip  # a sum over len(hidden): the token weights of the benchmark
