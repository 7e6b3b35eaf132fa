"""Memory of one GPU by kind, at the moments that can be the peak. Everything is arithmetic on sizes, except
activations, which are on a line through two traced passes. The peak of the trace is compared with the sums
(docs/plan.md).

    loss        the head computes its gradients; all activations of a micro-batch are in memory
    layers      the last layers free their activations (with checkpointing, each layer is computed again), and their
                gradients are summed over ranks
    end         all gradients are in memory; those of embedding and head come last
    sampling    thoughts are sampled, with a cache of keys and values
"""

import math
import os
from typing import NamedTuple

import torch

from dwrl_fast.compute import GIB
from dwrl_fast.ops.products import workspace_bytes
from dwrl_fast.plan.lengths import contexts
from dwrl_fast.plan.setup import NF4, Setup, Weights
from dwrl_fast.plan.trace import Traced

STEP = 256  # step of the budget search, in tokens
MOST = 1 << 20  # the largest budget of the search, in tokens
Kinds = dict[str, float]


class Memory(NamedTuple):
    """Bytes by kind at each moment, without moments that this run does not have."""

    moments: dict[str, Kinds]

    @property
    def fullest(self) -> str:
        """The moment with the largest sum."""
        return max(self.moments, key=self.sum)

    def sum(self, moment: str) -> float:
        """The sum of all kinds at that moment."""
        return sum(self.moments[moment].values())

    @property
    def peak(self) -> float:
        """The largest sum."""
        return self.sum(self.fullest)


class Parts(NamedTuple):
    """The distribution of a run over its GPUs. parts: the number of GPUs that a model is sharded over. ranks: whether
    there is more than one process. accumulates: whether gradients of an earlier micro-batch are kept.
    """

    parts: int
    ranks: bool
    accumulates: bool


def parts(setup: Setup, gpus: int, tokens: float, group: float) -> Parts:
    """The distribution over `gpus`. tokens: of a micro-batch. group: tokens of a group."""
    config = setup.config
    # At the start of a real training, torchrun's variables count.
    beside = getattr(config, "gpus_per_machine", int(os.environ.get("LOCAL_WORLD_SIZE", gpus)))
    mine = -(-config.minibatch_size // gpus)
    whole = max(1, int(tokens // group))
    return Parts(min(gpus, beside) if config.hsdp else gpus, gpus > 1, mine > whole)


def memory(setup: Setup, traced: Traced, gpus: int, budget: float, *, full: bool = False) -> Memory:
    """The memory of one of `gpus` with micro-batches of at most `budget` tokens. A larger group is a micro-batch of its
    own. Unless `full`, a micro-batch has at most a rank's share of a minibatch.
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
    """The largest budget, in tokens of a full micro-batch, that fits into `room` bytes; 0 if not even one group
    fits.
    """
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
    """The bytes of weights as stored."""
    return 4 * weights.trained + setup.dtype.itemsize * weights.frozen


def _kept(setup: Setup, lying: Parts) -> Kinds:
    """The kinds that are in memory at every moment."""
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
        found["whole copy"] = float(whole)  # of the model that samples, assumed to be as large
    return found


def _gathered(setup: Setup, lying: Parts) -> float:
    """Bytes of the weights that stay gathered, or cast, from the forward pass to the end of the backward pass."""
    shape, size = setup.shape, setup.dtype.itemsize
    if lying.ranks:
        return shape.root.all * size
    return 0.0 if setup.dtype == torch.float32 else shape.stack.trained * size  # cast copies that autocast keeps


def _head_gradient(setup: Setup) -> float:
    """Bytes of the gradient of the head's whole weight, as the operators return it."""
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
    """The current layer and the next one are gathered, and the gradients of the previous one are being reduced. The
    head's gradient is kept until the embedding's is ready, if both belong to the root unit or are one weight.
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
        return {"vLLM": share * setup.capacity * GIB}
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
