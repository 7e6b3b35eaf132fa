"""Memory of one GPU by kind, at the moments that can be the fullest. All is arithmetic on sizes; the activations alone
are on a line through two traced passes, and the trace's own peak is held against the sums (docs/plan.md).

    loss        the head forms its gradients, and all activations of a micro-batch are there
    layers      the last layers give up theirs (with checkpointing, each is computed again from its input), and their
                gradients are summed over ranks
    end         all gradients are there, and those of embedding and head come last
    sampling    thoughts are written, over a cache of keys and values
"""

import math
import os
from typing import NamedTuple

import torch

from dwrl_fast.ops.products import workspace_bytes
from dwrl_fast.plan.lengths import contexts
from dwrl_fast.plan.setup import NF4, Setup, Weights
from dwrl_fast.plan.trace import Traced

GIB = 2**30
STEP = 256  # tokens by which budgets are tried
MOST = 1 << 20  # tokens of the largest budget that is tried
Kinds = dict[str, float]


class Memory(NamedTuple):
    """Bytes by kind at each moment; without those that this run does not have."""

    moments: dict[str, Kinds]

    @property
    def fullest(self) -> str:
        """The moment with the largest sum."""
        return max(self.moments, key=self.sum)

    def sum(self, moment: str) -> float:
        """Of all kinds at that moment."""
        return sum(self.moments[moment].values())

    @property
    def peak(self) -> float:
        """The largest sum."""
        return self.sum(self.fullest)


class Parts(NamedTuple):
    """How a run lies on its GPUs. parts: over how many a model is cut. ranks: whether there is more than one process.
    accumulates: gradients of an earlier micro-batch are kept.
    """

    parts: int
    ranks: bool
    accumulates: bool


def parts(setup: Setup, gpus: int, tokens: float, group: float) -> Parts:
    """Of `gpus`, with micro-batches of `tokens` and groups of so many."""
    config = setup.config
    # A training that is about to begin has what torchrun says.
    beside = getattr(config, "gpus_per_machine", int(os.environ.get("LOCAL_WORLD_SIZE", gpus)))
    mine = -(-config.minibatch_size // gpus)
    whole = max(1, int(tokens // group))
    return Parts(min(gpus, beside) if config.hsdp else gpus, gpus > 1, mine > whole)


def memory(setup: Setup, traced: Traced, gpus: int, budget: float, *, full: bool = False) -> Memory:
    """Of one of `gpus`, with micro-batches of `budget` tokens at most: a group that is larger is one by itself, and
    none has more than a rank's share of a minibatch, unless they are to be `full`.
    """
    group = traced.small.tokens
    tokens = max(budget, group)
    if not full:
        tokens = min(tokens, group * -(-setup.config.minibatch_size // gpus))
    lying = parts(setup, gpus, tokens, group)
    kept = _kept(setup, lying)
    gradients = {"gradients": 0.0 if setup.config.cpu_offload else 4 * _trained(setup) / lying.parts}
    before = gradients if lying.accumulates else {}
    moments = {
        "loss": kept | before | _loss(setup, traced, lying, tokens),
        "layers": kept | before | _layers(setup, traced, lying, tokens),
        "end": kept | gradients | _end(setup, lying),
    }
    if setup.method.thoughts_each:
        moments["sampling"] = kept | _sampling(setup, gpus, budget)
    return Memory({name: {kind: size for kind, size in kinds.items() if size} for name, kinds in moments.items()})


def largest_budget(setup: Setup, traced: Traced, gpus: int, room: float) -> int:
    """The most tokens of a full micro-batch that fit into `room` bytes; 0 where not even one group does."""
    if memory(setup, traced, gpus, 0, full=True).peak > room:
        return 0
    low, high = traced.small.tokens // STEP, MOST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if memory(setup, traced, gpus, middle * STEP, full=True).peak <= room:
            low = middle
        else:
            high = middle - 1
    return low * STEP


def _trained(setup: Setup) -> int:
    return setup.shape.stack.trained + setup.shape.root.trained


def _bytes(setup: Setup, weights: Weights) -> float:
    """As they are kept."""
    return 4 * weights.trained + setup.dtype.itemsize * weights.frozen


def _kept(setup: Setup, lying: Parts) -> Kinds:
    """What is there at every moment."""
    shape, config = setup.shape, setup.config
    whole = shape.parameters * setup.dtype.itemsize
    stack = _bytes(setup, shape.stack)
    if config.load_in_4bit:
        stack += (NF4 - setup.dtype.itemsize) * shape.stack.frozen
    weights = (stack + _bytes(setup, shape.root)) / lying.parts
    found = {
        "weights": weights,
        "optimizer": 8 * setup.states * _trained(setup) / lying.parts,
        "whole copy": whole if lying.ranks and setup.writes else 0.0,
    }
    if config.cpu_offload:
        found |= {"weights": 0.0, "optimizer": 0.0}
    if setup.method.old_policy == "start" and not config.use_peft:
        found["frozen model"] = (whole if lying.ranks else 4 * shape.parameters) / lying.parts
    if setup.method.writer is not None:
        found["whole copy"] = float(whole)  # of the model that writes, taken to be as large
    return found


def _gathered(setup: Setup, lying: Parts) -> float:
    """Bytes of the weights that are whole, or cast, from the forward to the end of the backward pass."""
    shape, size = setup.shape, setup.dtype.itemsize
    if lying.ranks:
        return shape.root.all * size
    return 0.0 if setup.dtype == torch.float32 else shape.stack.trained * size  # which autocast keeps


def _head_gradient(setup: Setup) -> float:
    """Of the head's whole weight, as the operators give it."""
    if not (setup.shape.head and setup.shape.root.trained):
        return 0.0
    return math.prod(setup.shape.head) * setup.dtype.itemsize


def _loss(setup: Setup, traced: Traced, lying: Parts, tokens: float) -> Kinds:
    small, large = traced
    rows = math.ceil(tokens * large.rows / large.tokens)
    trained, head, device = setup.shape.root.trained > 0, setup.shape.head, setup.profile.device
    return {
        "gathered weights": _gathered(setup, lying),
        "gathered gradients": _head_gradient(setup),
        "activations": traced.at(tokens, small.loss["activations"], large.loss["activations"]),
        "head workspace": float(workspace_bytes(rows, head, setup.dtype, device, trained=trained)) if head else 0.0,
    }


def _layers(setup: Setup, traced: Traced, lying: Parts, tokens: float) -> Kinds:
    """The layer that is computed is gathered, and so is the next; the last one's gradients are on their way. The head's
    gradient waits for the embedding's where both are of the root's unit, or one weight.
    """
    shape, size = setup.shape, setup.dtype.itemsize
    layer = shape.layer
    found = {
        "gathered weights": _gathered(setup, lying),
        "gathered gradients": _head_gradient(setup) * (lying.ranks or shape.tied),
        "activations": traced.at(tokens, traced.small.layers, traced.large.layers),
    }
    if lying.ranks:
        kept = layer.all if setup.config.reshard_after_backward else shape.stack.all
        found["gathered weights"] += kept * size
        found["gathered gradients"] += layer.trained * size
        found["collectives"] = layer.all * size + 4 * layer.trained
    return found


def _end(setup: Setup, lying: Parts) -> Kinds:
    shape, size = setup.shape, setup.dtype.itemsize
    embedding = _head_gradient(setup) * (1 + shape.tied)
    if not lying.ranks:
        return {"gathered weights": _gathered(setup, lying), "gathered gradients": embedding}
    kept = 0 if setup.config.reshard_after_backward else shape.stack.all * size
    return {
        "gathered weights": float(kept),
        "gathered gradients": shape.root.trained * size,
        "collectives": 4 * shape.root.trained * (1 + lying.accumulates / lying.parts),
    }


def _sampling(setup: Setup, gpus: int, budget: float) -> Kinds:
    config, shape, size = setup.config, setup.shape, setup.dtype.itemsize
    if config.use_vllm:
        share = config.vllm_gpu_memory_utilization if config.vllm_mode == "colocate" else 0.0
        return {"vLLM": share * setup.profile.memory_gib * GIB}
    asked = contexts(setup.lengths, setup.method)
    rows = -(-config.rollout_batch_size // gpus)
    thoughts = rows * asked.number * config.num_generations
    needed = rows * asked.tokens + min(thoughts, config.generation_batch_size) * config.max_completion_length
    tokens = min(budget, rows * asked.tokens)
    return {
        "keys and values": min(config.generation_cache_gib * GIB, needed * shape.cached * size),
        "cast weights": 0.0 if gpus > 1 or setup.dtype == torch.float32 else shape.stack.trained * size,
        "activations": tokens * size * (3 * shape.inner + 4 * shape.width),
    }
