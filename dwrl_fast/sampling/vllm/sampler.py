"""A sampler over vLLM that always uses the trainer's current weights.

The trainer announces changes of its weights. Before the next thought all weights are sent, and then the prefix cache is
reset. Each thought is a separate request with its own seed, hashed from its purpose. Thoughts about one context share
its prefix in vLLM's cache.
"""

import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from dwrl_fast.encode.thought import Thought
from dwrl_fast.errors import ConfigError, DataError, NotFiniteError
from dwrl_fast.log import logger
from dwrl_fast.sampling.sampler import Rating, request_key
from dwrl_fast.sampling.vllm.engine import Answer, Ask, Engine, Sent


class VllmSampler:
    """A `RatingSampler` over `engine`. weights: yields the trainer's current weights by their names in an exported
    model; ranks iterate together. run: the name of this run, to distinguish it from others that use the same server.

    version: of the trainer's weights. sent: the version that the engine has; None if it has none from this run.
    """

    float32 = False  # its kernels differ from the trainer's, so the old policy's log-probs are recomputed

    def __init__(self, engine: Engine, stop_ids: Sequence[int], weights: Sent, run: str):
        self.engine, self.stop_ids, self.weights, self.run = engine, tuple(stop_ids), weights, run
        self.version = 0
        self.sent: int | None = None
        self.lock = threading.RLock()
        self.close = weakref.finalize(self, engine.close)

    def changed(self) -> None:
        """Note that the trainer's weights have changed."""
        self.version += 1

    def refresh(self) -> None:
        """Send the weights if the engine does not have the current ones. All ranks call this together."""
        with self.lock:
            if self.sent == self.version:
                return
            started, version = time.monotonic(), self.version
            self.sent = None  # until everything has arrived
            self.engine.load(self.weights, f"{self.run}/{version}")
            self.sent = version
            logger.info("vLLM has the weights of version %d, sent in %.1f s", version, time.monotonic() - started)

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
        """See `Sampler.sample`. ConfigError where a sequence would be longer than the engine takes."""
        return self.rated(
            contexts, n, None, max_tokens=max_tokens, temperature=temperature, seed=seed, progress=progress
        )

    def rated(
        self,
        contexts: Sequence[Sequence[int]],
        n: int,
        rating: Rating | None,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Thought]]:
        """See `RatingSampler.rated`. A score is read by a second request, of one token, over the cached prefix. Without
        a `rating` there are no scores.
        """
        if not all(contexts):
            raise DataError("a context has no token, so nothing can be sampled after it")
        self.refresh()
        self._check_length(max(map(len, contexts), default=0) + max_tokens + (rating.most + 1 if rating else 0))
        places: dict[tuple[int, ...], list[int]] = {}  # equal contexts get equal thoughts
        for place, context in enumerate(contexts):
            places.setdefault(tuple(context), []).append(place)
        asks = [
            Ask(list(context), max_tokens, temperature, _seed(seed, context, i), self.stop_ids)
            for context in places
            for i in range(n)
        ]
        owners = [owner for own in places.values() for owner in [len(own)] * n]
        counted = _Counting(owners, n, progress)
        try:
            answers = self.engine.complete(asks, counted if rating is None else _nothing)
            _check_finite(answers)
            found: list[list[Thought]] = [[] for _ in contexts]
            for k, own in enumerate(places.values()):
                for answer in answers[k * n : (k + 1) * n]:
                    thought = Thought(answer.ids, answer.logprobs, answer.ids[-1] in self.stop_ids)
                    for place in own:
                        found[place].append(thought)
            if rating is not None:
                found = self._rate(contexts, found, rating, progress)
        except NotFiniteError:
            self._rest()  # the batch may be skipped, and all ranks must send their weights again
            raise
        self._rest()
        return found

    def _rest(self) -> None:
        """Free the engine's memory for training, if it does so. It then needs the weights again."""
        if self.engine.sleeps:
            self.engine.sleep()
            self.sent = None

    def _rate(
        self,
        contexts: Sequence[Sequence[int]],
        thoughts: list[list[Thought]],
        rating: Rating,
        progress: Callable[[int], None] | None,
    ) -> list[list[Thought]]:
        asks = [
            Ask([*contexts[place], *rating.close(place, thought.ids)], labels=rating.labels)
            for place, some in enumerate(thoughts)
            for thought in some
        ]
        n = len(thoughts[0]) if thoughts else 1
        scores = [
            _score(answer.labels, rating.normalization)
            for answer in self.engine.complete(asks, _Counting([1] * len(asks), n, progress))
        ]
        if not all(map(math.isfinite, scores)):
            raise NotFiniteError("vLLM's log-probs of the labels are not finite: the weights hold NaN, or overflow")
        flat = iter(scores)
        return [[Thought(t.ids, t.logprobs, t.ended, score=next(flat)) for t in some] for some in thoughts]

    def text_logprobs(self, ids: Sequence[int]) -> list[float]:
        """Log-probs of all tokens of a text except the first, each read with the cache of the tokens before it, like a
        score. They show which weights the engine has.
        """
        self.refresh()
        self._check_length(len(ids))
        asks = [Ask(list(ids[:i]), labels=(ids[i],)) for i in range(1, len(ids))]
        return [answer.labels[0] for answer in self.engine.complete(asks, _nothing)]

    def _check_length(self, longest: int) -> None:
        if longest > self.engine.longest:
            raise ConfigError(
                f"a context with its thought may take {longest} tokens, but vLLM takes at most {self.engine.longest}: "
                "raise --vllm_max_model_length (of a server, its --max-model-len), or lower --max_completion_length "
                "or --max_length"
            )


class _Counting:
    """Reports finished contexts to `progress`: a context is finished when its n requests are. owners: for each request,
    the number of equal contexts that it serves.
    """

    def __init__(self, owners: Sequence[int], n: int, progress: Callable[[int], None] | None):
        self.owners, self.n, self.progress = owners, n, progress
        self.left = [set(range(k, k + n)) for k in range(0, len(owners), n)]
        self.lock = threading.Lock()

    def __call__(self, place: int) -> None:
        with self.lock:
            left = self.left[place // self.n]
            if place in left:
                left.discard(place)
                if not left and self.progress is not None:
                    self.progress(self.owners[place])


def _nothing(place: int) -> None:
    """A `done` callback that does nothing."""


def _seed(seed: int, context: Sequence[int], index: int) -> int:
    """A seed of 63 bits: vLLM takes signed 64-bit numbers, and -1 means none."""
    return request_key(seed, context, index) & (2**63 - 1)


def _score(labels: tuple[float, ...], normalization: str) -> float:
    """log p(Yes) in nats, like `ops.yes_no_logprob`."""
    yes, no = labels
    return yes if normalization == "vocab" else yes - float(np.logaddexp(yes, no))


def _check_finite(answers: Sequence[Answer]) -> None:
    if not all(math.isfinite(p) for answer in answers for p in answer.logprobs):
        raise NotFiniteError(
            "vLLM's log-probs are not finite, so its thoughts cannot be used. If there is an earlier checkpoint, "
            "resume from it with a lower learning rate or with --dtype fp32"
        )
