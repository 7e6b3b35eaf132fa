"""Seconds of one step by stage: counted work divided by the rates of a profile, on the rank with the most work.

The time of a pass is that of its matrix products at the product rate, of everything between them at the memory
bandwidth, and of a fixed time per operator. Attention and head are computed from their sizes. Collectives overlap with
computation if the profile says so; those of embedding and head never overlap. Groups are not split: with more ranks
than groups in a minibatch, some ranks have one group and the others wait.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from dwrl_fast.batching.tree import tree_sizes
from dwrl_fast.plan.allocations import Work
from dwrl_fast.plan.lengths import contexts, groups
from dwrl_fast.plan.profile import Profile
from dwrl_fast.plan.setup import Setup
from dwrl_fast.plan.trace import Traced

DRAWN = 10  # reads and writes of each float32 logit when a token is drawn
ADAMW = 28  # bytes that a fused step reads and writes per trained weight
CLIPPED = 12  # bytes per weight for computing and applying the gradient norm
HEAD_ROWS = 1024  # upper limit of the smallest dimension of a head's product


class Sizes(NamedTuple):
    """The sizes of one group. pairs: pairs of tokens of which one attends to the other. scores: sequences with a score
    at the last token. rows: trained tokens.
    """

    tokens: int
    pairs: int
    scores: int
    rows: int


def sizes(setup: Setup) -> Sizes:
    """The sizes of a group with the plan's lengths."""
    (group,) = groups(setup.lengths, setup.method, 1)
    ((tokens, pairs),) = tree_sizes([group], shared=setup.config.packing == "tree")
    rows = sum(one.thought.stop - one.thought.start for one in group.flat)
    return Sizes(tokens, pairs, len(group.flat), rows)


class Clock:
    """The seconds of passes of a planned model on one rank of `gpus`. parts: the number of GPUs that a model is sharded
    over.
    """

    def __init__(self, setup: Setup, traced: Traced, gpus: int, parts: int):
        self.setup, self.traced, self.gpus, self.parts = setup, traced, gpus, parts
        self.profile, self.shape = setup.profile, setup.shape

    def work(self, forward: bool, tokens: float) -> float:
        """Seconds of a pass of the layers over `tokens`, without attention."""
        small, large = ((each.forward if forward else each.backward) for each in self.traced)
        return self._products(large, tokens) + self._rest(small, large, tokens)

    def _products(self, large: Work, tokens: float) -> float:
        share = tokens / self.traced.large.tokens
        return sum(
            flops * share / self.profile.product_rate(min(smallest, int(tokens)))
            for smallest, flops in large.products.items()
        )

    def _rest(self, small: Work, large: Work, tokens: float) -> float:
        traffic = self.traced.at(tokens, small.traffic, large.traffic)
        return traffic / rate(self.profile, "memory") + large.operators * self.profile.operator

    def attention(self, pairs: float, times: int) -> float:
        """Seconds of attention. times: FLOPs per channel and pair: 4 forward, 8 backward."""
        flops = times * self.shape.channels * self.shape.depth * pairs
        return flops / (self.profile.attention * self.profile.share("attention"))

    def head(self, rows: float, products: int) -> float:
        """Seconds of `products` products of the head with `rows` rows each."""
        if not self.shape.head or not rows:
            return 0.0
        flops = 2 * products * rows * math.prod(self.shape.head)
        return flops / self.profile.product_rate(min(HEAD_ROWS, self.shape.head[1], int(rows)))

    def collectives(self, micro: int, *, gradients: bool = True) -> tuple[float, float]:
        """Seconds of the collectives of `micro` micro-batches for weights and, with `gradients`, for gradients: those
        of the layers, which can overlap with computation, and those of embedding and head, which cannot.
        """
        if self.gpus == 1:
            return 0.0, 0.0
        size, config = self.setup.dtype.itemsize, self.setup.config
        each = []
        again = gradients and config.reshard_after_backward  # gathered again for the backward pass
        for weights, gathers in ((self.shape.stack, 1 + again), (self.shape.root, 1)):
            moved = gathers * weights.all * size + 4 * weights.trained * gradients
            seconds = moved * (self.parts - 1) / self.parts / self._link(self.parts)
            if gradients and self.parts < self.gpus:  # --hsdp: gradient shards are summed over machines
                copies = self.gpus // self.parts
                crossing = 2 * 4 * weights.trained / self.parts * (copies - 1) / copies
                seconds += crossing / rate(self.profile, "network")
            each.append(micro * seconds)
        return each[0], each[1]

    def _link(self, parts: int) -> float:
        beside = getattr(self.setup.config, "gpus_per_machine", parts)
        return rate(self.profile, "link" if parts <= beside else "network")

    def together(self, computed: float, micro: int, *, gradients: bool = True) -> float:
        """Seconds of a computation with its collectives."""
        layers, root = self.collectives(micro, gradients=gradients)
        return (max(computed, layers) if self.profile.overlaps else computed + layers) + root

    def optimizer(self) -> float:
        """Seconds of one AdamW step with clipping."""
        trained = (self.shape.stack.trained + self.shape.root.trained) / self.parts
        return (ADAMW + CLIPPED) * trained / rate(self.profile, "memory")

    def sync(self) -> float:
        """Seconds to update the whole copy, if there is one."""
        if self.gpus == 1 or not self.setup.writes:
            return 0.0
        trained = self.shape.stack.trained + self.shape.root.trained
        moved = 4 * trained * (self.parts - 1) / self.parts / self._link(self.parts)
        return moved + (4 + self.setup.dtype.itemsize) * trained / rate(self.profile, "memory")

    def prefill(self, tokens: float, longest: float) -> float:
        """Seconds of the prefill of contexts with `tokens` tokens in total. longest: tokens of the longest."""
        return (self.work(True, tokens) + self.attention(tokens * longest / 2, 4)) / self.profile.share("sampling")

    def token(self, beside: float, seen: float) -> float:
        """Seconds for the next token of `beside` thoughts. seen: tokens of the cache that only one thought reads."""
        size, head = self.setup.dtype.itemsize, self.shape.head
        weights = self.shape.parameters * size / rate(self.profile, "memory")
        read = beside * (seen * self.shape.cached * size + 4 * DRAWN * (head[0] if head else 0))
        computed = max(self.work(True, beside) + self.head(beside, 1), weights)
        return (computed + read / rate(self.profile, "memory")) / self.profile.share("sampling")

    def beside(self, thoughts: float, tokens: float) -> float:
        """The number of a rank's thoughts that are sampled at the same time, over contexts with `tokens` tokens."""
        config = self.setup.config
        held = config.generation_cache_gib * 2**30 / (self.shape.cached * self.setup.dtype.itemsize)
        each = config.max_completion_length + tokens / thoughts  # memory is reserved for its full length
        return min(thoughts, config.generation_batch_size, max(1.0, held / each))

    def sampling(self, rows: float) -> float:
        """Seconds of sampling for `rows` preference groups, with thoughts of the planned length."""
        setup, each = self.setup, self.setup.config.num_generations
        asked, thought = contexts(setup.lengths, setup.method), setup.lengths.thought
        thoughts, tokens = rows * asked.number * each, rows * asked.tokens
        beside = self.beside(thoughts, tokens)
        passes = thoughts * thought / beside
        return self.prefill(tokens, asked.longest) + passes * self.token(beside, asked.longest / each + thought / 2)


def rate(profile: Profile, name: str) -> float:
    """The reached bytes per second of a bandwidth in the profile."""
    return float(getattr(profile, name)) * profile.share(name)


def step(setup: Setup, traced: Traced, gpus: int, parts: int, budget: float) -> dict[str, float]:
    """Seconds of a rollout batch by stage, with the names of the training metrics."""
    config, method, clock, group = setup.config, setup.method, Clock(setup, traced, gpus, parts), sizes(setup)
    mine = -(-config.minibatch_size // gpus)  # groups of the busiest rank
    minibatches = config.rollout_batch_size // config.minibatch_size
    micro = -(-mine // max(1, int(budget // group.tokens)))
    found: dict[str, float] = {}
    if method.thoughts_each:
        found["sync"] = clock.sync()
        found["sampling"] = clock.sampling(-(-config.rollout_batch_size // gpus))
    tokens = mine * group.tokens

    def passes(*directions: bool) -> float:
        """Seconds of the layers for this rank's groups of a minibatch, in micro-batches."""
        layers = sum(micro * clock.work(forward, tokens / micro) for forward in directions)
        return layers + clock.attention(mine * group.pairs, sum(4 if forward else 8 for forward in directions))

    if recomputes(setup):
        computed = passes(True) + clock.head(mine * group.rows, 1)
        found["old_logprobs"] = minibatches * clock.together(computed, micro, gradients=False)
    formed = 3 if method.old_policy == "sampler" else 4  # the clipped loss computes its gradients in the forward pass
    for phase in method.phases:
        computed = passes(True, False)  # the trace counts the recomputation of checkpointing in the backward pass
        computed += clock.attention(mine * group.pairs, 4 * config.gradient_checkpointing)
        computed += clock.head(mine * group.scores, 1 if phase == "thought" else 4)
        computed += clock.head(mine * group.rows, 0 if phase == "score" else formed)
        found[phase] = minibatches * (clock.together(computed, micro) + clock.optimizer())
    return found


def recomputes(setup: Setup) -> bool:
    """Whether the trainer computes the log-probs of the old policy."""
    old, source = setup.method.old_policy, setup.config.old_logprobs
    if old == "sampler":
        return source == "recompute" or (source == "auto" and setup.dtype != torch.float32)
    return old is not None


def flops(setup: Setup) -> Mapping[str, float]:
    """Model FLOPs of a group by purpose: 2 per weight and token forward, twice that backward. Recomputation is not
    counted.
    """
    group, shape, phases = sizes(setup), setup.shape, len(setup.method.phases)
    head = math.prod(shape.head) if shape.head else shape.width
    forward = 2 * shape.stack.all * group.tokens + 4 * shape.channels * shape.depth * group.pairs
    found = {"updates": phases * 3.0 * forward + 6.0 * head * (group.rows + group.scores)}
    if setup.method.thoughts_each:
        asked = contexts(setup.lengths, setup.method)
        drawn = asked.number * setup.config.num_generations * setup.lengths.thought
        found["thoughts"] = 2.0 * shape.stack.all * (asked.tokens + drawn) + 2.0 * head * drawn
    return found
