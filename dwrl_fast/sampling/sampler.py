"""What every engine that samples thoughts must do."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from dwrl_fast.encode.thought import Thought


class Limits(NamedTuple):
    """What sampling may take: thoughts written at once, and GiB of keys and values."""

    batch_size: int
    cache_gib: float


class Rating(NamedTuple):
    """What is asked after each thought, so that its score comes with it.

    close: from the place of a context among those sampled for, and a thought's ids, all that follows the context: the
    thought, and what asks for the label. most: the most tokens of that after the thought. labels, normalization: as
    `ops.yes_no_logprob` takes them.
    """

    close: Callable[[int, list[int]], list[int]]
    most: int
    labels: tuple[int, int]
    normalization: str


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

        Thought i of a context is drawn from `request_key(seed, context, i)` alone: it does not depend on what is
        sampled beside it, on the size of a batch, or on the process. Equal contexts of one call get equal thoughts.

        `progress` is called with the number of contexts finished since the last call.
        """
        ...


@runtime_checkable
class RatingSampler(Sampler, Protocol):
    """A sampler that can also rate: thoughts come with their scores, read where the cache ends that sampling left."""

    def rated(
        self,
        contexts: Sequence[Sequence[int]],
        n: int,
        rating: Rating,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Thought]]:
        """As `sample`, with the scores that `rating` asks for."""
        ...


def request_key(seed: int, context: Sequence[int], index: int) -> int:
    """The key of the noise of thought `index` about `context` (token ids), 64 bits as a signed number.

    seed: of the run and the step (`compute.step_seed`). What is asked, a row's response, stands in the context.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/".encode() + np.array(context, dtype=np.int64).tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)
