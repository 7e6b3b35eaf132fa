"""What every method is to the trainer, and the tally in which a step's figures add up over its micro-batches."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.models.adapters import Lora
from dwrl_fast.models.liger import use_liger
from dwrl_fast.models.model import load_generative, load_scalar, place
from dwrl_fast.models.pretrained import save_pretrained, try_saving
from dwrl_fast.sampling.transformers import TransformersSampler
from dwrl_fast.scoring import Progress, Runtime, Scorer


@dataclass(slots=True)
class Tally:
    """Sums with their counts, kept on the device; means are taken once a step, so that they do not depend on
    micro-batches.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int | Tensor] = field(default_factory=dict)
    policy: list[Tensor] = field(default_factory=list)

    def add(self, name: str, values: Tensor, count: int | None = None, where: Tensor | None = None) -> None:
        """Each of `values` counts once, or each where `where` is true, unless they are a sum over `count` already."""
        taken = values.detach().double()
        total = taken.sum() if where is None else torch.where(where, taken, 0).sum()
        more = where.sum() if where is not None else values.numel() if count is None else count
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + more

    def means(self) -> dict[str, float]:
        """Means by name, nan where nothing was counted, and what the policy loss counted. Synchronises."""
        counts = {name: int(count) for name, count in self.counts.items()}
        found = {name: total.item() / counts[name] if counts[name] else math.nan for name, total in self.sums.items()}
        if self.policy:
            stats = ops.read_stats(ops.combine_stats(self.policy))
            found |= {"ratio": stats["ratio"], "ratio_max": stats["ratio_max"], "clip_fraction": stats["clipped"]}
            found |= {"entropy": stats["entropy"], "trained_tokens": stats["tokens"], "invalid": stats["invalid"]}
        return found


class Method(ABC):
    """One way to train a preference model: what it samples, what it trains, how the model gives its verdict.

    template: the kind of template that it judges by; other_templates: those that it takes too where one is given.
    scalar: whether its model has a scalar head in place of a language model's. thinks: whether the model writes
    thoughts. trains: whether it does; otherwise the model is evaluated and saved. phases: the updates that one
    minibatch gets, in order; each has its own learning rate. card_options: the options that its card holds.
    """

    name: ClassVar[str]
    template: ClassVar[str] = "dialog"
    other_templates: ClassVar[tuple[str, ...]] = ()
    scalar: ClassVar[bool] = False
    thinks: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    card_options: ClassVar[tuple[str, ...]] = ()
    preparation: ClassVar[str] = "sample thoughts"  # what a rollout does, for the bar
    dialog: Any  # a Dialog or SingleTurn, as `template` says

    def __init__(self, config: TrainConfig, dialog: Dialog | SingleTurn, compute: Compute):
        self.config, self.dialog, self.compute = config, dialog, compute
        self.layout = Layout(
            config.packing,
            config.token_budget,
            dialog.pad_id,
            compute.device,
            mask_truncated=config.truncated_thoughts == "mask",
        )
        self.runtime = self.load(
            config.model_name_or_path,
            config.model_config,
            config.seed,
            dialog,
            compute,
            self.layout,
            config.generation_batch_size,
            lora_of(config, compute),
            new_head=True,
        )
        self.model = self.runtime.model
        if config.use_liger_kernel:
            use_liger(self.model.lm)
        self.scorer = self.make_scorer(self.runtime, self.card())

    @classmethod
    def load(
        cls,
        name_or_path: str | None,
        config_path: str | None,
        seed: int,
        dialog: Dialog | SingleTurn,
        compute: Compute,
        layout: Layout,
        sampling_batch: int,
        lora: Lora | None = None,
        *,
        new_head: bool = False,
    ) -> Runtime:
        """The model from a folder or hub name, or drawn from a configuration, ready to run on `compute.device`.

        new_head: a scalar head that the folder does not hold is drawn, to be trained.
        """
        if cls.scalar:
            scalar = load_scalar(name_or_path, config_path, seed, dialog.pad_id, lora, new_head=new_head)
            return Runtime(place(scalar, compute, layout), dialog, compute, layout, sampling_batch=sampling_batch)
        generative = load_generative(name_or_path, config_path, seed, lora)
        model = place(generative, compute, layout, thinks=cls.thinks)
        sampler = TransformersSampler(
            model.lm,
            dialog.stop_ids,
            dialog.pad_id,
            batch_size=sampling_batch,
            autocast=compute.autocast,
            float32=compute.float32,
        )
        return Runtime(model, dialog, compute, layout, sampler, sampling_batch)

    @classmethod
    @abstractmethod
    def make_scorer(cls, runtime: Runtime, card: dict[str, Any]) -> Scorer:
        """How the model, as it stands, scores responses; `card` as `card()` gave it."""

    @property
    @abstractmethod
    def phases(self) -> tuple[str, ...]: ...

    @abstractmethod
    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        """Encode the rows, sampling what the method needs (`progress` counts responses); the groups and what is worth
        logging.
        """

    @abstractmethod
    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        """The phase's loss over one micro-batch, a scalar divided by what the whole `minibatch` holds, so that it does
        not depend on micro-batches.
        """

    def learning_rate(self, phase: str) -> float:
        return self.config.learning_rate

    def card(self) -> dict[str, Any]:
        """What the JSON beside the saved model must hold so that it can be scored later."""
        return {"method": self.name} | {name: getattr(self.config, name) for name in self.card_options}

    def save_model(self, folder: Path) -> None:
        """A plain Hugging Face folder: weights as safetensors, tokenizer, and the card."""
        save_pretrained(folder, self.model, self.dialog, self.card())

    def try_saving(self, folder: Path) -> None:
        """`save_model` on trial, before anything is trained."""
        try_saving(folder, self.model, self.dialog, self.card())


def lora_of(config: TrainConfig, compute: Compute) -> Lora | None:
    if not config.use_peft:
        return None
    return Lora(config.lora_r, config.lora_alpha, config.lora_target_modules, config.load_in_4bit, compute)
