"""The interface of engines that sample thoughts."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from dwrl_fast.encode.thought import Thought


class Limits(NamedTuple):
    """Limits of sampling: thoughts at the same time, and GiB of keys and values."""

    batch_size: int
    cache_gib: float


class Rating(NamedTuple):
    """How to rate each thought, so that sampling also gives its score.

    close: from the index of a context and the ids of a thought, returns all tokens after the context: the thought, and
    the turns that ask for the label. most: the maximum number of tokens after the thought. labels, normalization: as in
    `ops.yes_no_logprob`.
    """

    close: Callable[[int, list[int]], list[int]]
    most: int
    labels: tuple[int, int]
    normalization: str


class Sampler(Protocol):
    """Samples from the model's own distribution, softmax(logits / temperature) over the whole vocabulary, without
    modifications.

    An engine must switch off top-k, top-p, min-p, penalties and forced tokens from any source, or raise an error.
    """

    float32: bool  # whether log-probs are computed in float32, so that they can replace the trainer's

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

        The draws of thought i of a context depend only on `request_key(seed, context, i)`, not on other thoughts, the
        batch size or the process. Equal contexts in one call get equal thoughts.

        `progress` is called with the number of contexts finished since the last call.
        """
        ...


@runtime_checkable
class RatingSampler(Sampler, Protocol):
    """A sampler that can also rate: it returns thoughts with their scores, computed with the cache of sampling."""

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
        """Like `sample`, with the scores that `rating` defines."""
        ...


def request_key(seed: int, context: Sequence[int], index: int) -> int:
    """The key of the noise of thought `index` about `context` (token ids), 64 bits as a signed number.

    seed: of the run and the step (`compute.step_seed`). The context contains the question and the row's response.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/".encode() + np.array(context, dtype=np.int64).tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)
