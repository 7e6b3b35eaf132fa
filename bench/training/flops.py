"""Model FLOPs of one pass, forward and backward: the work that the mathematics requires, independent of the
implementation.

A multiply-add counts 2, and a backward pass twice its forward pass: 6 per weight and token in the layers, 12 per
channel of a query head and attended key, 6 per weight of the head and row. Recomputation by checkpointing, recomputed
logits, padding, norms and embeddings are not counted.
"""

from collections.abc import Iterable
from typing import Any


def trunk_flops(lm: Any, tokens: int, attended: int) -> float:
    """The FLOPs of the layers. tokens: positions. attended: attended keys of all positions, including themselves."""
    config = lm.config
    weights = sum(weight.numel() for weight in lm.base_model.layers.parameters() if weight.dim() == 2)
    channels = config.num_attention_heads * lm.base_model.layers[0].self_attn.head_dim
    return 6.0 * weights * tokens + 12.0 * channels * config.num_hidden_layers * attended


def head_flops(lm: Any, rows: float) -> float:
    """The FLOPs of the head over `rows` hidden states. A row with only a forward pass counts one third."""
    return 6.0 * lm.get_output_embeddings().weight.numel() * rows


def attended_keys(lengths: Iterable[int]) -> int:
    """The number of keys attended by all tokens of causal sequences of these lengths."""
    return sum(size * (size + 1) // 2 for size in lengths)
