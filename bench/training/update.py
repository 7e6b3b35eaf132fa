"""The update of one minibatch on a model with random weights: our losses on a layout, and the parts for the updates of
peers.
"""

import copy
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import timed
from bench.training import lengths
from bench.training.flops import attended_keys, head_flops, trunk_flops
from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.batching.layout import Packing
from dwrl_fast.batching.tree import TreeBatch
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.dialog import Dialog, Template
from dwrl_fast.embedded.arrays import EVALUATE, RATE
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import Group, Thought
from dwrl_fast.methods import StepMetrics
from dwrl_fast.methods.dwrl import DualWeightedRL
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.scoring import Judging, Runtime
from dwrl_fast.training.policy import load_judging
from dwrl_fast.training.rollout import Rollout

OFF_POLICY = 0.1  # nats between old log-probs and the model's, so that some tokens are clipped, as after a few updates
COUNTERS = ("trunk tokens", "naive tokens", "head rows", "padding")


class Setting(NamedTuple):
    """A model (ours, and a Hugging Face model that shares its weights) and a minibatch."""

    method: DualWeightedRL
    runtime: Runtime
    lm: Any
    groups: list[Group]

    @property
    def old(self) -> list[Tensor]:
        """The old log-probs of every thought, [tokens] each."""
        return [torch.tensor(one.logprobs) for group in self.groups for some in group.thoughts for one in some]


class Way(NamedTuple):
    """A variant with one micro-batch size, before the best one is known."""

    note: str
    run: Callable[[], object]
    counters: dict[str, float]


def setting(
    shape: Mapping[str, Any],
    pairs: lengths.Pairs,
    thoughts: Sequence[int],
    *,
    checkpointing: bool = False,
    **options: Any,
) -> Setting:
    """`pairs` with thoughts of these lengths, whose old log-probs differ a little from the model's. options: of the
    trainer.
    """
    method, judging = loaded(shape, **options)
    model = judging.runtime.model.train()
    if checkpointing:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    lm = as_hugging_face(model.lm)
    noise = torch.Generator().manual_seed(0)

    def off(thought: Thought) -> list[float]:
        old = torch.tensor(thought.logprobs)
        return (old + OFF_POLICY * torch.randn(old.shape, generator=noise)).tolist()

    groups, _ = Rollout(method, judging).recomputed(lengths.groups(pairs, thoughts, shape["vocab_size"]))
    groups = [group.with_logprobs([[off(one) for one in some] for some in group.thoughts]) for group in groups]
    return Setting(method, judging.runtime, lm, groups)


def loaded(model: Mapping[str, Any] | Path, *, ranks: Ranks = ALONE, **options: Any) -> tuple[DualWeightedRL, Judging]:
    """DWRL and its model, from a folder, or from a shape with random weights that are initialised on the target device.
    ranks: the ranks that share the model. options: of the trainer.
    """
    dialog = Dialog(make_tokenizer(), Template(EVALUATE, RATE))  # any two ids can be the labels
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, Path):
            options["model_name_or_path"] = str(model)
        else:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(model))
            options["model_config"] = str(path)
        # Tokenizer and data are not read.
        config = TrainConfig(tokenizer_name_or_path="", dataset_name="", **options)
        compute = Compute.resolve("auto")
        method = DualWeightedRL(config, dialog)
        with compute.device:
            return method, load_judging(config, method, dialog, compute, ranks)


def as_hugging_face(lm: Any) -> Any:
    """A model that shares the parameters of `lm` and uses PyTorch's attention, as peers load it."""
    theirs = sharing_weights(lm)
    theirs.set_attn_implementation("sdpa")
    return theirs


def sharing_weights(lm: Any) -> Any:
    """Another model that shares the parameters of `lm`. Its modules can be changed without changing those of `lm`."""
    return copy.deepcopy(lm, {id(parameter): parameter for parameter in lm.parameters()})


def update(lm: Any, batches: Sequence[Batch], phases: Sequence[Callable[[Any], Tensor]]) -> tuple[Tensor, ...]:
    """Forward and backward of each phase over `batches`; returns the losses, and the gradients of some weights of
    `lm`.
    """
    layers, found = lm.base_model.layers, []
    watched = (lm.get_input_embeddings().weight, layers[0].self_attn.q_proj.weight, layers[-1].mlp.down_proj.weight)
    with without_gradients(lm):
        for phase in phases:
            found += [accumulated(map(phase, batches)), *(weight.grad for weight in watched)]
            lm.zero_grad(set_to_none=True)
    return tuple(found)


def accumulated(losses: Iterable[Tensor], backward: Callable[[Tensor], object] = Tensor.backward) -> Tensor:
    """The sum of `losses`, with the backward pass of each before the next one is computed."""
    found = []
    for loss in losses:
        backward(loss)
        found.append(loss.detach())
    return torch.stack(found).sum()


@contextmanager
def without_gradients(lm: Any) -> Iterator[None]:
    """A context that frees all gradients at the end, also if memory runs out, because gradients are part of the
    measured memory.
    """
    try:
        yield
    finally:
        lm.zero_grad(set_to_none=True)


def ours(it: Setting, packing: Packing) -> Way:
    """The trainer's losses over one layout, which is built once per minibatch, within the measured time."""
    method, runtime = it.method, it.runtime
    layout = dataclasses.replace(runtime.layout, packing=packing)

    def loss(phase: str, minibatch: Size, batch: Batch) -> Tensor:
        with runtime.compute.autocast():
            return method.loss(phase, runtime.model, batch, minibatch, StepMetrics())

    def run() -> tuple[Tensor, ...]:
        made = layout.batches(it.groups)
        return update(runtime.model.lm, made, [partial(loss, phase, Size.of(it.groups)) for phase in method.phases])

    batches = layout.batches(it.groups)
    counted = counters(batches) | phase_flops(runtime.model.lm, batches)
    return Way(f"{len(batches)} micro-batch{'es' if len(batches) > 1 else ''}", run, counted)


def counters(batches: Iterable[Batch]) -> dict[str, float]:
    """The COUNTERS of a pass over `batches`."""
    rows = [(b.trunk_tokens, b.naive_tokens, b.head_rows, b.padding) for b in batches]
    return dict(zip(COUNTERS, map(sum, zip(*rows, strict=True)), strict=True))


def phase_flops(lm: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """`flops` of a DWRL phase, as mean of both phases: scores are read in both and trained in the first; thoughts are
    trained in the second.
    """
    scores, thoughts = sum(len(b.score_rows) for b in batches), sum(len(b.token_rows) for b in batches)
    return flops(lm, batches, (scores + scores / 3 + thoughts) / 2)


def flops(lm: Any, batches: Sequence[Batch], rows: float) -> dict[str, float]:
    """Model GFLOPs of a pass over `batches` with `rows` rows of the head; also those of the trunk without sharing."""
    naive = attended_keys(len(s.ids) for batch in batches for group in batch.groups for s in group.flat)
    attended = sum(int((b.position_ids + 1).sum()) for b in batches if isinstance(b, TreeBatch)) or naive
    head = head_flops(lm, rows)
    return {
        "model GFLOP": (trunk_flops(lm, sum(b.trunk_tokens - b.padding for b in batches), attended) + head) / 1e9,
        "naive GFLOP": (trunk_flops(lm, sum(b.naive_tokens for b in batches), naive) + head) / 1e9,
    }


def fastest(*ladders: Iterable[Way]) -> Way | None:
    """The fastest way; each runs once. A ladder of growing micro-batches ends when they no longer get faster, or no
    longer fit into a GPU.
    """
    best: tuple[float, Way] | None = None
    for ladder in ladders:
        least = math.inf
        for way in ladder:
            try:
                taken = timed(way.run)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            if taken >= least:
                break
            least = taken
            best = (taken, way) if best is None or taken < best[0] else best
    return None if best is None else best[1]


def powers(first: int, most: int) -> list[int]:
    """`first` and its repeated doublings, up to `most`."""
    return [first << i for i in range((most // first).bit_length())]
