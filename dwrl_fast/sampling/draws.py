"""The draw of a token, shared by all engines in this process."""

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.errors import NotFiniteError


def pick(logprob: Tensor, temperature: float, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen ids [R] and their log-probs [R], from log-probs [R, V] in float32; temperature 0 is greedy.

    logprob: from `logprobs_at`. keys, positions: [R], as in `ops.gumbel_pick`. Raises NotFiniteError if a log-prob is
    not finite.
    """
    chosen = ops.gumbel_pick(logprob, keys, positions) if temperature else logprob.argmax(-1)
    found = logprob.gather(-1, chosen[:, None]).squeeze(-1)
    if not torch.isfinite(found).all():
        raise NotFiniteError(
            "the model's logits are not finite, so no thought can be sampled. If there is an earlier checkpoint, "
            "resume from it with a lower learning rate or with --dtype fp32"
        )
    return chosen, found


def logprobs_at(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) [R, V] in float32; temperature 0 is treated as 1."""
    scaled = logits.float() if temperature in (0.0, 1.0) else logits.float() / temperature
    return scaled.log_softmax(-1)
