"""What every engine that samples thoughts must do."""

from collections.abc import Callable, Sequence
from typing import Protocol

from dwrl_fast.encode.thought import Thought


class Sampler(Protocol):
    """Samples from the model's own distribution: softmax(logits / temperature) over the whole vocabulary and nothing
    else.

    An engine that would apply top-k, top-p, min-p, penalties or forced tokens, from whatever source, must switch them
    off or refuse.
    """

    float32: bool  # whether log-probs are computed in float32, so that they can stand for the trainer's

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
        """`n` thoughts for each context (token ids). temperature 0 is greedy, with log-probs at temperature 1.

        `progress` is called with the number of contexts finished since the last call.
        """
        ...
