"""The model that is trained: it alone runs micro-batches and takes optimizer steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.errors import ConfigError, NotFiniteError
from dwrl_fast.methods import Method, StepMetrics
from dwrl_fast.models.adapters import Lora, adapted, base_fingerprint
from dwrl_fast.models.liger import use_liger
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.sampling import KeptThoughts, Limits
from dwrl_fast.scoring import Judging, PolicyJudging, Runtime, ScoredGroup, judging_of, load_runtime
from dwrl_fast.training.optimizer import Optimizers

PREFILLED = "prefilled.jsonl"  # in the run's folder
Loss = Callable[[str, Any, Batch, Size, StepMetrics], Tensor]


class Minibatch(NamedTuple):
    """What one update is made of. size: over all ranks. batches: this rank's, as many as the others have."""

    size: Size
    batches: list[Batch]


class Policy:
    """Model, optimizers and device placement. `run_batches` of its `runtime` is the pass without gradients, `update`
    the one with them: in these two places ranks compute what is theirs, and take part in what they do together.
    """

    def __init__(self, runtime: Runtime, optimizers: Optimizers):
        self.runtime, self.optimizers = runtime, optimizers
        self.metrics = StepMetrics()

    @property
    def model(self) -> Any:
        """The root module."""
        return self.runtime.model

    def pack(self, groups: Sequence[Group], size: int) -> list[Minibatch]:
        """Minibatches of `size` groups, each in micro-batches, as every phase of a step takes them."""
        shares = (self.runtime.share(groups[i : i + size]) for i in range(0, len(groups), size))
        return [Minibatch(share.size, share.batches) for share in shares]

    def update(self, phase: str, minibatch: Minibatch, loss: Loss, place: int, used: float = 0.0) -> Tensor:
        """One optimizer step of `phase` over a minibatch, at the schedule's `place`, with the share `used` of the run's
        time over; the gradient's norm before clipping.

        NotFiniteError, and no step, where a loss or the norm is not a number.
        """
        sharded = self.runtime.sharded
        losses, left = [], len(minibatch.batches)
        for batch in minibatch.batches:
            left -= 1
            if sharded is not None and not self.optimizers.config.reshard_after_backward:
                sharded.model.set_reshard_after_backward(left == 0)
            with self.runtime.compute.autocast():
                value = (
                    loss(phase, self.model, batch, minibatch.size, self.metrics)
                    if batch.groups
                    else self.model.idle(batch)
                )
            value.backward()
            losses.append(value.detach())
        norm = self.optimizers.clip()
        total = torch.stack(losses).sum()
        whole = self.runtime.ranks.sum(torch.stack([total.float(), norm.to(total.device).float()]))
        if not torch.isfinite(whole).all():
            sources = [group.preference.source for batch in minibatch.batches for group in batch.groups[:8]]
            raise NotFiniteError(
                f"phase {phase}: losses {torch.stack(losses).tolist()}, gradient norm {norm.item()}. No step was taken "
                "with it. If a checkpoint was saved, resume from it with a lower learning rate, or with --dtype fp32. "
                f"Rows: {', '.join(sources[:8])} ..."
            )
        self.optimizers.step(phase, place, used)
        self.runtime.changed()
        return norm

    def read_metrics(self, groups: Sequence[Group]) -> tuple[dict[str, float], list[ScoredGroup]]:
        """What the updates since the last call, over `groups`, added up to on all ranks: means by name, and the groups
        with the last scores that the model gave them.
        """
        metrics, self.metrics = self.metrics, StepMetrics()
        each = self.runtime.ranks.gather(metrics.scores(groups))
        scores: list[list[list[float]]] = [next(filter(None, found), []) for found in zip(*each, strict=True)]
        return metrics.joined(self.runtime.ranks).means(), [*map(ScoredGroup, groups, scores)]

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name; tied weights once, frozen ones not at all."""
        model = {f"model.{name}": p.detach() for name, p in self.optimizers.named.items()}
        return model | self.optimizers.tensors()

    def identity(self) -> dict[str, Any]:
        """Of a frozen model under adapters, which `state` does not hold, a fingerprint."""
        if not adapted(self.model.lm):
            return {}
        sharded = self.runtime.sharded
        return {"base": base_fingerprint(self.model.lm) if sharded is None else sharded.fingerprint}


def load_judging(
    config: TrainConfig, method: Method, dialog: Dialog | SingleTurn, compute: Compute, ranks: Ranks = ALONE
) -> Judging:
    """The model that a run starts from, placed and ready to be trained, and how it gives its verdict. ranks: those that
    train it together. ModelError where it cannot be loaded or cannot run the layout.
    """
    layout = Layout(
        config.packing,
        config.token_budget,
        dialog.pad_id,
        compute.device,
        mask_truncated=config.truncated_thoughts == "mask",
    )
    if config.cpu_offload and (ranks.mesh is None or compute.device.type != "cuda"):
        raise ConfigError("--cpu_offload: it needs a GPU and processes that torchrun started; leave it out.")
    if config.load_in_4bit and ranks.count > 1:
        raise ConfigError("--load_in_4bit: weights in 4 bits are not sharded here; leave it out, or use one process.")
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
        ranks=ranks,
        offload=config.cpu_offload,
        vllm=config.vllm,
    )
    judging = judging_of(runtime, method.card())
    start = judging.start if isinstance(judging, PolicyJudging) else None
    if config.use_liger_kernel:
        models = [some.model for some in (runtime, start) if some is not None]
        models += [] if runtime.sharded is None or runtime.sharded.replica is None else [runtime.sharded.replica]
        for model in {id(model): model for model in models}.values():
            use_liger(model.lm)
    if isinstance(runtime.sampler, KeptThoughts) and config.output_dir is not None:
        runtime.sampler.keep_in(Path(config.output_dir) / PREFILLED, ranks)
    return judging
