"""Sampling with a Hugging Face model in this process, for model families that cannot run on a tree.

This package has its own decoding loop, so that only softmax(logits / temperature) determines a thought: `generate`
merges the model's generation_config into its arguments, and that of Qwen2.5 turns on top-k, top-p and a repetition
penalty. Each context is prefilled once and its cache is repeated n times. Finished sequences leave the batch. The draws
depend only on the thought (`request_key`), so batch size and other sequences affect only rounding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dwrl_fast.encode.thought import Thought
from dwrl_fast.sampling.draws import logprobs_at, pick
from dwrl_fast.sampling.sampler import request_key


class TransformersSampler:
    """Samples from the current weights of `lm` at each call.

    batch_size: sequences decoded at once. autocast: a factory of the context manager for the computation.
    """

    def __init__(
        self,
        lm: Any,
        stop_ids: Sequence[int],
        pad_id: int,
        *,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        float32: bool = True,
    ):
        self.lm, self.pad_id, self.batch_size = lm, pad_id, batch_size
        self.stop_ids = torch.tensor(list(stop_ids), device=lm.device)
        self.autocast, self.float32 = autocast, float32

    @torch.no_grad()
    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        n: int,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Thought]]:
        """See `Sampler.sample`. Contexts of similar length are decoded together; the result is in the order given."""
        training = self.lm.training
        self.lm.eval()
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        size = max(1, self.batch_size // n)
        thoughts: list[list[Thought]] = [[] for _ in contexts]
        try:
            with self.autocast():
                for start in range(0, len(order), size):
                    chunk = order[start : start + size]
                    sampled = self._decode([contexts[i] for i in chunk], n, max_tokens, temperature, seed)
                    for i, found in zip(chunk, sampled, strict=True):
                        thoughts[i] = found
                    if progress is not None:
                        progress(len(chunk))
        finally:
            self.lm.train(training)
        return thoughts

    def _decode(
        self, contexts: list[Sequence[int]], n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Thought]]:
        from transformers import DynamicCache

        device = self.lm.device
        longest = max(map(len, contexts))
        ids = torch.tensor([[self.pad_id] * (longest - len(c)) + list(c) for c in contexts], device=device)
        mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts], device=device)
        cache = DynamicCache(config=self.lm.config)
        output = self.lm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        rows = len(contexts) * n
        keys = torch.tensor([request_key(seed, context, i) for context in contexts for i in range(n)], device=device)
        copies = torch.arange(len(contexts), device=device).repeat_interleave(n)
        cache.reorder_cache(copies)  # works also for layers with a state, to repeat and to drop rows
        logits, mask = output.logits[copies, -1], mask[copies]
        tokens = torch.zeros((rows, max_tokens), dtype=torch.int64, device=device)
        logprobs = torch.zeros((rows, max_tokens), device=device)
        lengths = torch.full((rows,), max_tokens, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        alive = torch.arange(rows, device=device)
        for t in range(max_tokens):
            own = keys[alive]
            chosen, logprob = pick(logprobs_at(logits, temperature), temperature, own, torch.full_like(own, t))
            tokens[alive, t], logprobs[alive, t] = chosen, logprob
            stopped = torch.isin(chosen, self.stop_ids)
            lengths[alive[stopped]], ended[alive[stopped]] = t + 1, True
            keep = (~stopped).nonzero().squeeze(-1)
            if len(keep) == 0 or t + 1 == max_tokens:
                break
            if len(keep) < len(alive):
                alive, chosen, mask = alive[keep], chosen[keep], mask[keep]
                cache.reorder_cache(keep)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            output = self.lm(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]
        flat = [
            Thought(tokens[r, :size].tolist(), logprobs[r, :size].tolist(), bool(end))
            for r, (size, end) in enumerate(zip(lengths.tolist(), ended.tolist(), strict=True))
        ]
        return [flat[i : i + n] for i in range(0, rows, n)]
