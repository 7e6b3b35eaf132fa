"""A loaded model with everything that is needed to run it without gradients."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.errors import ModelError
from dwrl_fast.methods import METHODS
from dwrl_fast.models.adapters import Lora, base_fingerprint, plain_config
from dwrl_fast.models.export import check_exported_names, exported
from dwrl_fast.models.model import (
    SHORTEN,
    cast_once,
    load_generative,
    load_scalar,
    place,
    refuse_past_positions,
)
from dwrl_fast.models.sharding import Sharded, cost_of, narrow
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.sampling import KeptThoughts, Limits, Sampler, TransformersSampler, TreeSampler, split
from dwrl_fast.sampling.vllm import VllmSampler, VllmSettings, make_engine

Result = TypeVar("Result")


class Share(NamedTuple):
    """The division of groups over ranks: the indices of each rank's groups, and the total size. batches: this rank's
    micro-batches. All ranks have the same number; missing ones are idle batches without groups.
    """

    places: list[list[int]]
    size: Size
    batches: list[Batch]


@dataclass(frozen=True, slots=True)
class Runtime:
    """model: a `GenerativeModel` or `ScalarModel`. sampler: None if it cannot write thoughts. sharded: gives unsharded
    weights if the model is sharded over ranks. vllm: the engine that writes the thoughts, if it is not the model
    itself.
    """

    model: Any
    dialog: Any
    compute: Compute
    layout: Layout
    sampler: Sampler | None = None
    ranks: Ranks = ALONE
    sharded: Sharded | None = None
    vllm: VllmSampler | None = None

    def changed(self) -> None:
        """Note that the weights have changed since thoughts were last sampled."""
        if self.sharded is not None:
            self.sharded.stale = True
        if self.vllm is not None:
            self.vllm.changed()

    def refresh(self) -> None:
        """Update the sampler's weights, which sampling would otherwise do. All ranks call this together."""
        if self.vllm is not None:
            self.vllm.refresh()
        elif self.sharded is not None and self.sharded.replica is not None:
            self.sharded.refresh()

    def close(self) -> None:
        """Stop all engines of this runtime."""
        if self.vllm is not None:
            self.vllm.close()

    def share(self, groups: Sequence[Group]) -> Share:
        """Divide `groups` over the ranks. All ranks hold all groups and compute the same division."""
        shares = self.layout.split(groups, self.ranks.count)
        _, micro = shares[self.ranks.rank]
        batches = self.layout.laid_out(micro)
        missing = max(len(micro) for _, micro in shares) - len(batches)
        if missing:
            batches += [self.layout.idle()] * missing
        return Share([own for own, _ in shares], Size.of(groups), batches)

    def run_batches(
        self,
        groups: Sequence[Group],
        read: Callable[[Batch], Sequence[Result]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Result]:
        """The result of `read` for each group, in order. read: takes a micro-batch and returns one result per group.

        The model is in evaluation mode, without gradients, in the run's dtype. `progress` counts responses. This is the
        only pass without gradients: for scores of every kind, old log-probs, and log-probs of a frozen model. Ranks
        share the groups, and all ranks get all results. Raises ModelError, before anything is computed, if a sequence
        has more tokens than the model can compute.
        """
        refuse_past_positions(self.model, max((group.longest for group in groups), default=0), SHORTEN)
        found: dict[Group, Result] = {}
        training = self.model.training
        share = self.share(groups)
        self.model.eval()
        left = sum(len(group.preference.responses) for group in groups)
        try:
            with torch.no_grad(), self.compute.autocast():
                for batch in share.batches:
                    if not batch.groups:
                        self.model.idle(batch)
                        continue
                    found |= zip(batch.groups, read(batch), strict=True)
                    done = sum(len(group.preference.responses) for group in batch.groups)
                    left -= done
                    if progress is not None:
                        progress(done)
        finally:
            self.model.train(training)
            if self.sharded is not None:
                self.sharded.model.reshard()  # the root unit would otherwise be freed only by a backward pass
        own = [found[groups[place]] for place in share.places[self.ranks.rank]]
        joined = self.ranks.joined(own, share.places)
        if progress is not None and left:
            progress(left)  # responses of the other ranks
        return joined

    def whole(self) -> Any:
        """The model itself; if it is sharded, a whole copy on the first rank and None on the others."""
        return self.model if self.sharded is None else self.sharded.whole()

    def logprobs(self, groups: Sequence[Group], temperature: float = 1.0) -> list[list[list[list[float]]]]:
        """The log-probs of each group's trained tokens, in nats: K lists of N, one list per sequence."""

        def read(batch: Batch) -> list[list[list[list[float]]]]:
            head = self.model(batch, tokens=True)
            return batch.by_token(head.logprobs(head.token, batch.targets, temperature))

        return self.run_batches(groups, read)


def load_runtime(
    card: dict[str, Any],
    name_or_path: str | None,
    config_path: str | None,
    seed: int,
    dialog: Dialog | SingleTurn,
    compute: Compute,
    layout: Layout,
    limits: Limits,
    lora: Lora | None = None,
    *,
    new_head: bool = False,
    frozen: bool = False,
    ranks: Ranks = ALONE,
    offload: bool = False,
    vllm: VllmSettings | None = None,
) -> Runtime:
    """The model that `card` describes, from a folder or hub name, or initialised from a configuration, on
    `compute.device`.

    limits: of sampling. new_head: initialise a scalar head that the folder lacks, for training. frozen: nothing will be
    trained. ranks: the ranks that share the model in shards; offload: in CPU memory. vllm: the settings if vLLM writes
    the thoughts. Raises ModelError if the model, or the one that writes prefilled thoughts, cannot be loaded.
    """
    method = METHODS[card["method"]]
    dtype = _dtype(compute, ranks)
    model: Any
    if method.scalar:
        model = load_scalar(name_or_path, config_path, seed, dialog.pad_id, lora, new_head=new_head, dtype=dtype)
    else:
        model = load_generative(name_or_path, config_path, seed, lora, dtype=dtype)
    writes = method.thinks and not method.scalar
    vllm = vllm if writes else None
    trains = method.trains and not frozen
    model = place(model, compute, layout, thinks=writes and vllm is None, trains=trains)
    if not trains:
        model.requires_grad_(False)
        if ranks.mesh is None:
            cast_once(model, compute)
    samples = not method.scalar
    if ranks.mesh is None:
        sampler = _sampler(model, dialog, compute, layout, limits) if samples and vllm is None else None
        runtime = Runtime(model, dialog, compute, layout, sampler)
    else:
        layout = replace(layout, cost=cost_of(model))
        sharded = Sharded(model, ranks, compute, samples=writes and vllm is None, offload=offload)
        sharded.begin(layout.idle())
        sampler = None
        if sharded.replica is not None:
            sampler = split(_sampler(sharded.replica, dialog, compute, layout, limits), ranks, sharded.refresh)
        runtime = Runtime(sharded.model, dialog, compute, layout, sampler, ranks, sharded)
    if vllm is not None:
        runtime = _with_vllm(runtime, vllm, limits, trains=trains)
    return _prefilled(runtime, card["prefilled_by"], limits) if "prefilled_by" in card else runtime


def _with_vllm(runtime: Runtime, settings: VllmSettings, limits: Limits, *, trains: bool) -> Runtime:
    """The runtime with vLLM as sampler. vLLM uses only the weights that are sent to it."""
    model, sharded, compute, ranks = runtime.model, runtime.sharded, runtime.compute, runtime.ranks
    lm = model.lm if sharded is None else sharded.skeleton.lm
    check_exported_names(lm)
    run = ranks.from_first(lambda: uuid.uuid4().hex[:12])
    engine = make_engine(settings, plain_config(lm), compute.dtype, compute.device, ranks, limits, trains=trains)
    sampler = VllmSampler(engine, runtime.dialog.stop_ids, partial(exported, model, sharded, compute.dtype), run)
    return replace(runtime, sampler=split(sampler, ranks, sampler.refresh), vllm=sampler)


def _dtype(compute: Compute, ranks: Ranks) -> Literal["auto"] | None:
    """The dtype of loaded weights: one process loads float32; several ranks load the dtype of the file and cast shard
    by shard, unless everything is computed in float32.
    """
    return None if ranks.mesh is None or compute.float32 else "auto"


def load_writer(
    name_or_path: str,
    dialog: Dialog | SingleTurn,
    compute: Compute,
    layout: Layout,
    limits: Limits,
    ranks: Ranks = ALONE,
) -> tuple[Sampler, str]:
    """A sampler with an untrained language model that only writes thoughts in `dialog`, and the fingerprint of the
    model. Every rank holds the whole model. Raises ModelError if it cannot be loaded.
    """
    dtype = _dtype(compute, ranks)
    model = place(load_generative(name_or_path, None, 0, dtype=dtype), compute, layout, trains=False)
    fingerprint = base_fingerprint(model.lm)
    model.requires_grad_(False)
    if dtype is None:
        cast_once(model, compute)
    else:
        narrow(model, compute)
    return split(_sampler(model, dialog, compute, layout, limits), ranks, lambda: None), fingerprint


def _sampler(model: Any, dialog: Any, compute: Compute, layout: Layout, limits: Limits) -> Sampler:
    how: dict[str, Any] = {"autocast": compute.autocast, "float32": compute.float32}
    if model.shares_cache:
        return TreeSampler(model, dialog.stop_ids, limits=limits, token_budget=layout.token_budget, **how)
    return TransformersSampler(model.lm, dialog.stop_ids, dialog.pad_id, batch_size=limits.batch_size, **how)


def _prefilled(runtime: Runtime, writer: str, limits: Limits) -> Runtime:
    """The runtime of a scalar model with the thoughts of the language model `writer`."""
    dialog = runtime.dialog
    try:
        sampler, fingerprint = load_writer(writer, dialog, runtime.compute, runtime.layout, limits, runtime.ranks)
    except ModelError as error:
        raise ModelError(
            f"this model reads thoughts that {writer} writes, so that model is needed too. {error}"
        ) from error
    return replace(runtime, sampler=KeptThoughts(sampler, fingerprint, dialog.tokenizer, dialog.stop_ids))
