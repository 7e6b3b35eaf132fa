"""The usual implementation: padded sequences, logits of every position, and the loss as in the paper."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import proc_bytes
from bench.training.update import Setting, Way, counters, flops, powers, update
from dwrl_fast.batching.padded import PaddedBatch, padded_batch
from dwrl_fast.ops.oracle import dual_weights, policy_loss

LOGITS_HELD = 4  # tensors with the size of the logits at the peak: logits, log-probs and both gradients


def plain(it: Setting) -> Iterator[Way]:
    """The usual implementation, in micro-batches of 1, 2, 4 ... pairs of similar length, as memory allows."""
    runtime, ordered = it.runtime, sorted(it.groups, key=lambda group: group.longest, reverse=True)

    def loss(phase: Callable[..., Tensor], batch: PaddedBatch) -> Tensor:
        with runtime.compute.autocast():
            logits = it.lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            return phase(logits, batch, runtime.dialog.yes_id, len(it.groups))

    phases = [partial(loss, phase) for phase in (score_loss, thought_loss)]
    for size in powers(1, len(ordered)):
        micro = (ordered[i : i + size] for i in range(0, len(ordered), size))
        batches = [padded_batch(some, runtime.dialog.pad_id, runtime.compute.device) for some in micro]
        if max(logit_bytes(batch, it.lm.config.vocab_size) for batch in batches) > free_memory():
            return
        rows = {"head rows": sum(batch.trunk_tokens for batch in batches)}
        yield Way(
            f"micro-batches of {size} pair{'s' if size > 1 else ''}",
            partial(update, it.lm, batches, phases),
            counters(batches) | rows | flops(it.lm, batches, sum(batch.naive_tokens for batch in batches)),
        )


def score_loss(logits: Tensor, batch: PaddedBatch, yes_id: int, pairs: int) -> Tensor:
    """Phase A (DWRL Eq. 13) over the pairs of `batch`, divided by `pairs`."""
    chosen, rejected = _scores(logits, batch, yes_id)
    weights = dual_weights(chosen, rejected)
    gain = (weights.chosen * chosen).sum(-1) - (weights.rejected * rejected).sum(-1)
    return -(weights.misalignment * gain).sum() / pairs


def thought_loss(logits: Tensor, batch: PaddedBatch, yes_id: int, pairs: int) -> Tensor:
    """Phase B (DWRL Eq. 14) over the pairs of `batch`, divided by `pairs`."""
    with torch.no_grad():
        weights = dual_weights(*_scores(logits, batch, yes_id))
        n = weights.chosen.shape[-1]
        advantage = torch.stack([weights.chosen - 1 / n, 1 / n - weights.rejected], 1).flatten()
        each = weights.misalignment.repeat_interleave(2 * n) / (n * batch.lengths * pairs)
    following = F.pad(batch.input_ids[:, 1:], (0, 1))
    logprob = logits.float().log_softmax(-1).gather(-1, following[..., None]).flatten()[batch.token_rows]
    assert batch.old_logprob is not None
    return policy_loss(logprob, batch.old_logprob, advantage[batch.segment_ids], each[batch.segment_ids]).loss


def logit_bytes(batch: PaddedBatch, vocabulary: int, element: int = 4) -> int:
    """The approximate bytes of the logits of `batch` at the peak."""
    return LOGITS_HELD * batch.input_ids.numel() * vocabulary * element


def _scores(logits: Tensor, batch: PaddedBatch, yes_id: int) -> tuple[Tensor, Tensor]:
    """log p(Yes) of the thoughts about each response, [B, N] each."""
    scores = logits.flatten(0, 1)[batch.score_rows].float().log_softmax(-1)[:, yes_id]
    chosen, rejected = scores.view(len(batch.groups), 2, -1).unbind(1)
    return chosen, rejected


def free_memory() -> int:
    """Available bytes on the current device."""
    if torch.cuda.is_available():  # memory cached by PyTorch is available
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return proc_bytes("/proc/meminfo", "MemAvailable")
