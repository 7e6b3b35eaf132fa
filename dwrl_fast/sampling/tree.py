"""Sampling in this process with a cache shared by texts: every prefix is computed, stored and read once.

First, shared prefixes of contexts are found (prefixes.py). A step is one forward pass over new tokens only, end to end:
the next token of every active thought, as many tokens of waiting contexts as the token budget allows, and the rating
turns of thoughts that have just ended. When a thought is finished, the next one takes its place. Positions are those of
the separate texts. No mask is built: `ops.cache_attention` gets what each token attends to.

The draws depend only on the thought (`request_key`), so other thoughts affect only rounding.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwrl_fast.encode.thought import Thought
from dwrl_fast.errors import ConfigError, DataError
from dwrl_fast.ops import BLOCK
from dwrl_fast.sampling.cache import Cache, blocks_for
from dwrl_fast.sampling.draws import logprobs_at, pick
from dwrl_fast.sampling.forward import Forward, Writer
from dwrl_fast.sampling.prefixes import Prefix, prefix_tree
from dwrl_fast.sampling.sampler import Limits, Rating, request_key


@dataclass(eq=False, slots=True)
class _Run:
    """Tokens of one text in the cache: the first `kept` of `ids` are stored; the first of them has `position` in the
    text.
    """

    position: int
    ids: list[int]
    blocks: list[int]
    kept: int = 0

    @property
    def pending(self) -> int:
        return len(self.ids) - self.kept


@dataclass(eq=False, slots=True)
class _Prefix(_Run):
    """A run shared by contexts. left: the number of unfinished thoughts here or below. state: [H], the hidden state at
    its last token.
    """

    node: Prefix | None = None
    left: int = 0
    state: Tensor | None = None
    thoughts: "list[_Thought]" = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Thought(_Run):
    """A thought while it is sampled and then rated."""

    context: int = 0
    index: int = 0
    key: int = 0
    drawn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    finished: bool = False


def tiles_of(seen: Sequence[tuple[_Run, int, int]]) -> np.ndarray:
    """[T, 5] int64, `CacheStep.tiles` for runs, each visible to the new tokens of consecutive rows."""
    runs = np.array([(run.position, run.kept, first, stop) for run, first, stop in seen], dtype=np.int64).reshape(-1, 4)
    blocks = [block for run, _, _ in seen for block in run.blocks[: blocks_for(run.kept)]]
    counts = -(-runs[:, 1] // BLOCK)
    position, kept, first, stop = np.repeat(runs, counts, axis=0).T
    before = BLOCK * (np.arange(len(blocks)) - np.repeat(counts.cumsum() - counts, counts))  # in tokens, within its run
    return np.stack([blocks, position + before, np.minimum(BLOCK, kept - before), first, stop], axis=1)


class TreeSampler:
    """Samples from the current weights of `model` at each call. The cache lives for one call.

    limits: further thoughts wait. token_budget: tokens of one forward pass. autocast: a factory of the context manager
    for the computation.
    """

    def __init__(
        self,
        model: Writer,
        stop_ids: Sequence[int],
        *,
        limits: Limits,
        token_budget: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        float32: bool = True,
    ):
        self.model, self.stop_ids = model, frozenset(stop_ids)
        self.limits, self.token_budget = limits, token_budget
        self.autocast, self.float32 = autocast, float32

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
        """See `Sampler.sample`. Raises ConfigError if the cache cannot hold one context with one thought."""
        return self._sample(contexts, n, max_tokens, temperature, seed, progress, None)

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
        """See `RatingSampler.rated`. Raises the same errors as `sample`."""
        return self._sample(contexts, n, max_tokens, temperature, seed, progress, rating)

    @torch.no_grad()
    def _sample(self, contexts: Sequence[Sequence[int]], n: int, *rest: Any) -> list[list[Thought]]:
        if not all(contexts):
            raise DataError("a context has no token, so nothing can be sampled after it")
        lm = self.model.lm
        training = lm.training
        lm.eval()
        try:
            with self.autocast():
                return _Sampling(self, contexts, n, *rest).run()
        finally:
            lm.train(training)

    @torch.no_grad()
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, measured with a pass of one token."""
        cache = Cache(1)
        Forward(self.model, cache)([0], [0], [0], np.array([[0, 0, 1, 0, 1]]))
        return cache.nbytes


class _Sampling:
    """One call of `TreeSampler.sample`."""

    def __init__(
        self,
        sampler: TreeSampler,
        contexts: Sequence[Sequence[int]],
        n: int,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None,
        rating: Rating | None,
    ):
        self.sampler, self.contexts, self.n = sampler, contexts, n
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self.progress, self.rating = progress, rating
        self.model, self.device = sampler.model, sampler.model.lm.device
        self.ends = prefix_tree(contexts)
        self.runs: dict[Prefix, _Prefix] = {}  # the runs in the cache, in depth-first order
        order = sorted(range(len(contexts)), key=lambda c: self.ends[c].number)
        self.waiting = deque((c, i) for c in order for i in range(n))
        self.writing: list[_Thought] = []
        self.left = [n] * len(contexts)
        self.found: list[list[Thought | None]] = [[None] * n for _ in contexts]
        self.own = blocks_for(max_tokens + (rating.most if rating else 0))  # blocks of one thought
        self.cache = Cache(self._blocks())
        self.forward = Forward(self.model, self.cache)

    def _blocks(self) -> int:
        """The number of blocks: what all thoughts need, or what the memory holds."""
        if not self.contexts:
            return 0
        nodes = {node for end in self.ends for node in end.path()}
        need = sum(blocks_for(len(node.ids)) for node in nodes)
        need += min(len(self.contexts) * self.n, self.sampler.limits.batch_size) * self.own
        size = self.sampler.block_bytes()
        there = int(self.sampler.limits.cache_gib * 2**30 // size)
        for c, end in enumerate(self.ends):
            least = sum(blocks_for(len(node.ids)) for node in end.path()) + self.own
            if least > there:
                raise ConfigError(
                    f"a context of {len(self.contexts[c])} tokens with a thought of up to {self.max_tokens} takes "
                    f"{least * size / 2**20:,.0f} MiB of keys and values, but --generation_cache_gib "
                    f"{self.sampler.limits.cache_gib:g} holds only {there * size / 2**20:,.0f}: raise it, or lower "
                    "--max_length or --max_completion_length"
                )
        return min(need, there)

    def run(self) -> list[list[Thought]]:
        while self.waiting or self.writing:
            self._admit()
            self._step()
        return [[thought for thought in some if thought is not None] for some in self.found]

    def _admit(self) -> None:
        """Admit thoughts for which there is memory, in depth-first order, so that no thought waits for memory held by
        others.
        """
        while self.waiting and len(self.writing) < self.sampler.limits.batch_size:
            context, index = self.waiting[0]
            end = self.ends[context]
            new = [node for node in end.path() if node not in self.runs]
            if sum(blocks_for(len(node.ids)) for node in new) + self.own > len(self.cache.free):
                return
            self.waiting.popleft()
            for node in new:
                blocks = self.cache.take(blocks_for(len(node.ids)))
                self.runs[node] = _Prefix(node.position, node.ids, blocks, node=node, left=node.below * self.n)
            key = request_key(self.seed, self.contexts[context], index)
            thought = _Thought(end.stop, [], self.cache.take(self.own), context=context, index=index, key=key)
            self.runs[end].thoughts.append(thought)
            self.writing.append(thought)

    def _step(self) -> None:
        """Run one forward pass and read its results: the next token of each active thought, or its score."""
        ids, position, slot, tiles, last = self._layout()
        states = torch.empty(0, device=self.device)
        if ids:
            states = self.forward(ids, position, slot, tiles)
            for run in self.runs.values():
                if run.state is None and run.pending == 0 and run.thoughts:
                    run.state = states[last[run]].clone()  # a view would keep the states of the whole pass
        finished = [thought for thought in self.writing if thought.finished]
        drawing: list[_Thought] = []
        before: list[int] = []  # the rows of states that predict their next tokens
        begun: dict[_Prefix, int] = {}  # stored states have rows after those of the new tokens
        for thought in self.writing:
            run = self.runs[self.ends[thought.context]]
            if not thought.finished and (thought.drawn or run.state is not None):
                drawing.append(thought)
                before.append(last[thought] if thought.drawn else begun.setdefault(run, len(ids) + len(begun)))
        if drawing:
            kept = [run.state for run in begun if run.state is not None]
            self._draw(drawing, before, torch.cat([states, torch.stack(kept)]) if kept else states)
        if finished:
            self._rate(finished, states[[last[thought] for thought in finished]])

    def _layout(self) -> tuple[list[int], list[int], list[int], np.ndarray, dict[_Run, int]]:
        """The new tokens in depth-first order, so that the tokens that see a run are consecutive: ids, positions,
        slots, the tiles of all visible runs, and the row of each run's last token.
        """
        ids: list[int] = []
        position: list[int] = []
        slot: list[int] = []
        seen: list[tuple[_Run, int, int]] = []  # (run, first row that sees it, row after the last one)
        last: dict[_Run, int] = {}
        budget = max(1, self.sampler.token_budget - sum(thought.pending for thought in self.writing))

        def lay(run: _Run, most: int) -> None:
            stop = min(run.kept + most, len(run.ids))
            for j in range(run.kept, stop):
                ids.append(run.ids[j])
                position.append(run.position + j)
                slot.append(run.blocks[j // BLOCK] * BLOCK + j % BLOCK)
            run.kept = stop
            last[run] = len(ids) - 1

        def see(run: _Run, start: int) -> None:
            if start < len(ids) and run.kept:
                seen.append((run, start, len(ids)))

        above: list[tuple[_Prefix, int]] = []
        for run in self.runs.values():
            assert run.node is not None
            while above and above[-1][0].node is not run.node.parent:
                see(*above.pop())
            above.append((run, len(ids)))
            before = run.kept
            lay(run, budget)
            budget -= run.kept - before
            for thought in run.thoughts:
                start = len(ids)
                lay(thought, len(thought.ids))
                see(thought, start)
        while above:
            see(*above.pop())
        empty = self.forward.padded(len(ids)) - len(ids)
        ids += [0] * empty
        position += [0] * empty
        slot += [-1] * empty  # not stored
        return ids, position, slot, tiles_of(seen), last

    def _draw(self, thoughts: list[_Thought], before: list[int], states: Tensor) -> None:
        """Draw the next token of each of `thoughts` from the states in the rows `before`. Thoughts that start from the
        same state share its logits.
        """
        rows = {row: i for i, row in enumerate(dict.fromkeys(before))}
        numbers = [[rows[row] for row in before], [thought.key for thought in thoughts]]
        numbers.append([len(thought.drawn) for thought in thoughts])
        which, keys, places = torch.from_numpy(np.array(numbers, dtype=np.int64)).to(self.device)
        states = states[torch.tensor(list(rows), device=self.device)]
        logprob = logprobs_at(self.model.head(states, states[:0]).logits(states), self.temperature)
        logprob = logprob if len(rows) == len(thoughts) else logprob[which]
        chosen, found = pick(logprob, self.temperature, keys, places)
        for thought, token, value in zip(thoughts, chosen.tolist(), found.tolist(), strict=True):
            thought.drawn.append(token)
            thought.logprobs.append(value)
            thought.ended = token in self.sampler.stop_ids
            if not thought.ended and len(thought.drawn) < self.max_tokens:
                thought.ids.append(token)
            elif self.rating is None:
                self._finish(thought, None)
            else:
                thought.ids = self.rating.close(thought.context, thought.drawn)
                thought.finished = True

    def _rate(self, thoughts: list[_Thought], states: Tensor) -> None:
        assert self.rating is not None
        head = self.model.head(states, states[:0])
        scores = head.scores(self.rating.labels, self.rating.normalization).tolist()
        for thought, score in zip(thoughts, scores, strict=True):
            self._finish(thought, score)

    def _finish(self, thought: _Thought, score: float | None) -> None:
        self.found[thought.context][thought.index] = Thought(
            thought.drawn, thought.logprobs, thought.ended, score=score
        )
        self.writing.remove(thought)
        self.cache.give(thought.blocks)
        end = self.ends[thought.context]
        self.runs[end].thoughts.remove(thought)
        for node in end.path():
            run = self.runs[node]
            run.left -= 1
            if run.left == 0:
                self.cache.give(run.blocks)
                del self.runs[node]
        self.left[thought.context] -= 1
        if self.progress is not None and self.left[thought.context] == 0:
            self.progress(1)
