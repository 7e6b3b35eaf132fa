"""A loaded model, and all that it takes to run it without gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.errors import ModelError
from dwrl_fast.methods import METHODS
from dwrl_fast.models.adapters import Lora
from dwrl_fast.models.model import load_generative, load_scalar, place
from dwrl_fast.sampling import KeptThoughts, Limits, Sampler, TransformersSampler, TreeSampler

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Runtime:
    """model: a `GenerativeModel` or `ScalarModel`. sampler: None where it cannot write thoughts."""

    model: Any
    dialog: Any
    compute: Compute
    layout: Layout
    sampler: Sampler | None = None

    def run_batches(
        self,
        groups: Sequence[Group],
        read: Callable[[Batch], Sequence[Result]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Result]:
        """What `read` gives for each group, in their order: it takes a micro-batch and gives one thing a group of it.

        The model is in its mode for scoring, without gradients, in the run's dtype. `progress` counts responses. This
        is the one pass without gradients: of scores of every kind, of old log-probs and of a frozen model's.
        """
        found: dict[Group, Result] = {}
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.compute.autocast():
                for batch in self.layout.batches(groups):
                    found |= zip(batch.groups, read(batch), strict=True)
                    if progress is not None:
                        progress(sum(len(group.preference.responses) for group in batch.groups))
        finally:
            self.model.train(training)
        return [found[group] for group in groups]

    def logprobs(self, groups: Sequence[Group], temperature: float = 1.0) -> list[list[list[list[float]]]]:
        """The log-probs of each group's trained tokens, in nats: K lists of N, a list a sequence."""

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
) -> Runtime:
    """The model that `card` tells of, from a folder or hub name or drawn from a configuration, on `compute.device`.

    limits: of sampling. new_head: a scalar head that the folder does not hold is drawn,
    to be trained. ModelError where the model, or the one that prefills its thoughts, cannot be loaded.
    """
    method = METHODS[card["method"]]
    if method.scalar:
        scalar = load_scalar(name_or_path, config_path, seed, dialog.pad_id, lora, new_head=new_head)
        runtime = Runtime(place(scalar, compute, layout), dialog, compute, layout)
        return _prefilled(runtime, card["prefilled_by"], limits) if "prefilled_by" in card else runtime
    generative = load_generative(name_or_path, config_path, seed, lora)
    return _sampling(place(generative, compute, layout, thinks=method.thinks), dialog, compute, layout, limits)


def load_writer(
    name_or_path: str, dialog: Dialog | SingleTurn, compute: Compute, layout: Layout, limits: Limits
) -> Sampler:
    """A language model, as it stands, that only writes thoughts in `dialog`. ModelError where it cannot be loaded."""
    model = place(load_generative(name_or_path, None, 0), compute, layout, thinks=True).requires_grad_(False)
    sampler = _sampling(model, dialog, compute, layout, limits).sampler
    assert sampler is not None
    return sampler


def _sampling(model: Any, dialog: Any, compute: Compute, layout: Layout, limits: Limits) -> Runtime:
    how: dict[str, Any] = {"autocast": compute.autocast, "float32": compute.float32}
    sampler: Sampler
    if model.shares_cache:
        sampler = TreeSampler(model, dialog.stop_ids, limits=limits, token_budget=layout.token_budget, **how)
    else:
        sampler = TransformersSampler(model.lm, dialog.stop_ids, dialog.pad_id, batch_size=limits.batch_size, **how)
    return Runtime(model, dialog, compute, layout, sampler)


def _prefilled(runtime: Runtime, writer: str, limits: Limits) -> Runtime:
    """With the thoughts of the language model `writer`, which stands beside the scalar one."""
    dialog = runtime.dialog
    try:
        sampler = load_writer(writer, dialog, runtime.compute, runtime.layout, limits)
    except ModelError as error:
        raise ModelError(f"this model reads thoughts that {writer} writes, which must be there too. {error}") from error
    kept = KeptThoughts(sampler, dialog.tokenizer, dialog.stop_ids)
    return Runtime(runtime.model, dialog, runtime.compute, runtime.layout, kept)
