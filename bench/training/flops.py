"""Model FLOPs of one pass, forward and backward: what the mathematics asks for, however it is computed.

A multiplication with its addition counts 2, and a backward twice its forward: 6 per weight and token in the layers, 12
per channel of a query head and key that a token attends to, 6 per weight of the head and row that it reads. A forward
that checkpointing repeats, a product of logits formed twice, and padding count nothing; nor do norms and embeddings.
"""

from collections.abc import Iterable
from typing import Any


def trunk_flops(lm: Any, tokens: int, attended: int) -> float:
    """Of the layers: `tokens` positions, that attend to `attended` keys together, themselves among them."""
    config = lm.config
    weights = sum(weight.numel() for weight in lm.base_model.layers.parameters() if weight.dim() == 2)
    channels = config.num_attention_heads * lm.base_model.layers[0].self_attn.head_dim
    return 6.0 * weights * tokens + 12.0 * channels * config.num_hidden_layers * attended


def head_flops(lm: Any, rows: float) -> float:
    """Of the head, over `rows` hidden states; one that takes part in a forward alone is a third of a row."""
    return 6.0 * lm.get_output_embeddings().weight.numel() * rows


def attended_keys(lengths: Iterable[int]) -> int:
    """By the tokens of causal sequences of these lengths."""
    return sum(size * (size + 1) // 2 for size in lengths)
