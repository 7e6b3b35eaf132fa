"""The model that is trained: it alone runs micro-batches and takes optimizer steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.errors import NotFiniteError
from dwrl_fast.methods import Method, StepMetrics
from dwrl_fast.models.adapters import Lora, adapted, base_fingerprint
from dwrl_fast.models.liger import use_liger
from dwrl_fast.sampling import KeptThoughts, Limits
from dwrl_fast.scoring import Judging, PolicyJudging, Runtime, judging_of, load_runtime
from dwrl_fast.training.optimizer import Optimizers

PREFILLED = "prefilled.jsonl"  # in the run's folder
Loss = Callable[[str, Any, Batch, Size, StepMetrics], Tensor]


class Policy:
    """Model, optimizers and device placement. `run_batches` of its `runtime` is the pass without gradients, `update`
    the one with them: in these two places several processes will agree on their counts.
    """

    def __init__(self, runtime: Runtime, optimizers: Optimizers):
        self.runtime, self.optimizers = runtime, optimizers
        self.metrics = StepMetrics()

    @property
    def model(self) -> Any:
        """The root module."""
        return self.runtime.model

    def pack(self, groups: Sequence[Group], size: int) -> list[list[Batch]]:
        """Minibatches of `size` groups, each in micro-batches, as every phase of a step takes them."""
        return [self.runtime.layout.batches(groups[i : i + size]) for i in range(0, len(groups), size)]

    def update(self, phase: str, minibatch: Sequence[Batch], loss: Loss, place: int) -> Tensor:
        """One optimizer step of `phase` over a minibatch, at the schedule's `place`; the gradient's norm before
        clipping.

        NotFiniteError, and no step, where a loss or the norm is not a number.
        """
        size, losses = Size.of(minibatch), []
        for batch in minibatch:
            with self.runtime.compute.autocast():
                value = loss(phase, self.model, batch, size, self.metrics)
            value.backward()
            losses.append(value.detach())
        norm = self.optimizers.clip()
        if not torch.isfinite(torch.stack([*losses, norm])).all():
            raise NotFiniteError(
                f"phase {phase}: losses {torch.stack(losses).tolist()}, gradient norm {norm.item()}. No step was taken "
                "with it. If a checkpoint was saved, resume from it with a lower learning rate, or with --dtype fp32. "
                f"Rows: {', '.join(group.preference.source for group in minibatch[0].groups[:8])} ..."
            )
        self.optimizers.step(phase, place)
        return norm

    def read_metrics(self) -> StepMetrics:
        """What the updates since the last call added up to."""
        metrics, self.metrics = self.metrics, StepMetrics()
        return metrics

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name; tied weights once, frozen ones not at all."""
        model = {f"model.{name}": p.detach() for name, p in self.optimizers.named.items()}
        return model | self.optimizers.tensors()

    def identity(self) -> dict[str, Any]:
        """Of a frozen model under adapters, which `state` does not hold, a fingerprint."""
        return {"base": base_fingerprint(self.model.lm)} if adapted(self.model.lm) else {}


def load_judging(config: TrainConfig, method: Method, dialog: Dialog | SingleTurn, compute: Compute) -> Judging:
    """The model that a run starts from, placed and ready to be trained, and how it gives its verdict. ModelError where
    it cannot be loaded or cannot run the layout.
    """
    layout = Layout(
        config.packing,
        config.token_budget,
        dialog.pad_id,
        compute.device,
        mask_truncated=config.truncated_thoughts == "mask",
    )
    lora = Lora(config.lora_r, config.lora_alpha, config.lora_target_modules, config.load_in_4bit, compute)
    runtime = load_runtime(
        method.card(),
        config.model_name_or_path,
        config.model_config,
        config.seed,
        dialog,
        compute,
        layout,
        Limits(config.generation_batch_size, config.generation_cache_gib),
        lora if config.use_peft else None,
        new_head=True,
    )
    judging = judging_of(runtime, method.card())
    start = judging.start if isinstance(judging, PolicyJudging) else None
    for each in {id(some.model): some for some in (runtime, start) if some is not None}.values():
        if config.use_liger_kernel:
            use_liger(each.model.lm)
    if isinstance(runtime.sampler, KeptThoughts) and config.output_dir is not None:
        runtime.sampler.keep_in(Path(config.output_dir) / PREFILLED)
    return judging
