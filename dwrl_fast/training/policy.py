"""The trained model. Only this class trains micro-batches and takes optimizer steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute, out_of_memory
from dwrl_fast.config import TrainConfig
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.errors import ConfigError, NotFiniteError
from dwrl_fast.log import logger
from dwrl_fast.methods import Method, StepMetrics
from dwrl_fast.models.adapters import Lora, base_fingerprint
from dwrl_fast.models.liger import use_liger
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.sampling import Limits
from dwrl_fast.scoring import Judging, PolicyJudging, Runtime, ScoredGroup, judging_of, load_runtime
from dwrl_fast.training.optimizer import Optimizers

Loss = Callable[[str, Any, Batch, Size, StepMetrics], Tensor]


class Minibatch(NamedTuple):
    """The data of one update. groups, size: over all ranks. batches: those of this rank; all ranks have the same
    number.
    """

    groups: Sequence[Group]
    size: Size
    batches: list[Batch]


class Policy:
    """Model, optimizers and device placement. `runtime.run_batches` is the pass without gradients, `update` the pass
    with gradients. In both, each rank computes its share and takes part in the collectives.
    """

    def __init__(self, runtime: Runtime, optimizers: Optimizers):
        self.runtime, self.optimizers = runtime, optimizers
        self.metrics = StepMetrics()
        self.halved = 0  # number of minibatches computed again with smaller micro-batches

    @property
    def model(self) -> Any:
        """The root module."""
        return self.runtime.model

    def pack(self, groups: Sequence[Group], size: int) -> list[Minibatch]:
        """Minibatches of `size` groups, each divided into micro-batches, for all phases of a step."""
        cuts = [groups[i : i + size] for i in range(0, len(groups), size)]
        shares = map(self.runtime.share, cuts)
        return [Minibatch(cut, share.size, share.batches) for cut, share in zip(cuts, shares, strict=True)]

    def update(self, phase: str, minibatch: Minibatch, loss: Loss, place: int, used: float = 0.0) -> Tensor:
        """One optimizer step of `phase` over a minibatch. place, used: the position in the schedule and the used share
        of the run's time. Returns the gradient norm before clipping. If a single process runs out of memory, the
        minibatch is computed once more in micro-batches of half the size.

        If it raises, no step was taken, and metrics and gradients are as before. Raises NotFiniteError if an old
        log-prob, a loss or the norm is not finite, and ConfigError if memory is not sufficient.
        """
        before, batches = self.metrics.copy(), minibatch.batches
        try:
            losses = self._backward(phase, batches, minibatch.size, loss)
            if losses is None:
                self._forget(before)
                batches = self._halved(minibatch)
                losses = self._backward(phase, batches, minibatch.size, loss, last=True)
            assert losses is not None
            norm = self.optimizers.clip()
            self._check_finite(phase, minibatch, batches, losses, norm)
        except BaseException:
            self._forget(before)
            raise
        self.optimizers.step(phase, place, used)
        self.runtime.changed()
        return norm

    def _backward(
        self, phase: str, batches: Sequence[Batch], size: Size, loss: Loss, *, last: bool = False
    ) -> Tensor | None:
        """The losses of micro-batches; accumulates their gradients. None if memory was not sufficient. Raises
        ConfigError instead at the last try, or with several ranks, because one rank cannot retry alone.
        """
        sharded, ranks = self.runtime.sharded, self.runtime.ranks
        losses, left = [], len(batches)
        try:
            for batch in batches:
                left -= 1
                if sharded is not None and not self.optimizers.config.reshard_after_backward:
                    sharded.model.set_reshard_after_backward(left == 0)
                with self.runtime.compute.autocast():
                    value = (
                        loss(phase, self.model, batch, size, self.metrics) if batch.groups else self.model.idle(batch)
                    )
                value.backward()
                losses.append(value.detach())
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if last or ranks.mesh is not None:
                tokens = max(batch.trunk_tokens for batch in batches)
                raise ConfigError(
                    f"out of memory in a micro-batch of {tokens} "
                    f"tokens{f' on rank {ranks.rank}' * (ranks.count > 1)}: give "
                    f"--token_budget {max(1, tokens // 2)} or less, or --gradient_checkpointing. If one preference "
                    "group alone is too large, lower --max_completion_length or --num_generations. "
                    f"{str(error).splitlines()[0][:200]}"
                ) from error
            return None
        return torch.stack(losses)

    def _halved(self, minibatch: Minibatch) -> list[Batch]:
        """The minibatch in micro-batches of half the size. Logs and counts this."""
        budget = max(1, max(batch.trunk_tokens for batch in minibatch.batches) // 2)
        self.halved += 1
        logger.warning(
            "Out of memory in a micro-batch: this minibatch is computed again in micro-batches of %d tokens. If this "
            "line is frequent, --token_budget %d avoids the repeated work.",
            *(budget, budget),
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return replace(self.runtime.layout, token_budget=budget).batches(minibatch.groups)

    def _check_finite(
        self, phase: str, minibatch: Minibatch, batches: Sequence[Batch], losses: Tensor, norm: Tensor
    ) -> None:
        old = [batch.old_logprob.sum() for batch in batches if batch.old_logprob is not None]
        known = torch.stack(old).sum() if old else losses.new_zeros(())
        here = torch.stack([each.to(losses.device).float() for each in (losses.sum(), norm, known)])
        if torch.isfinite(self.runtime.ranks.sum(here)).all():
            return
        sources = [group.preference.source for group in minibatch.groups[:8]]
        wrong = "" if torch.isfinite(known) else "log-probs of the sampler or of the frozen model are not finite, "
        raise NotFiniteError(
            f"phase {phase}: {wrong}losses {losses.tolist()}, gradient norm {norm.item()}. The optimizer took no "
            "step. If a checkpoint was saved, resume from it with a lower learning rate, or with --dtype fp32. Rows: "
            f"{', '.join(sources)} ..."
        )

    def _forget(self, metrics: StepMetrics) -> None:
        """Undo an update that is given up: restore `metrics` and free the gradients."""
        self.metrics = metrics
        self.optimizers.clear()

    def read_metrics(self, groups: Sequence[Group]) -> tuple[dict[str, float], list[ScoredGroup]]:
        """The metrics of the updates over `groups` since the last call, over all ranks: means by name, and the groups
        with their last scores.
        """
        metrics, self.metrics = self.metrics, StepMetrics()
        each = self.runtime.ranks.gather(metrics.scores(groups))
        scores: list[list[list[float]]] = [next(filter(None, found), []) for found in zip(*each, strict=True)]
        return metrics.joined(self.runtime.ranks).means(), [*map(ScoredGroup, groups, scores)]

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name. Tied weights occur once, frozen weights are left out."""
        model = {f"model.{name}": p.detach() for name, p in self.optimizers.named.items()}
        return model | self.optimizers.tensors()

    def fingerprint(self) -> str:
        """The fingerprint of the untrained model."""
        sharded = self.runtime.sharded
        return base_fingerprint(self.model.lm) if sharded is None else sharded.fingerprint


def load_judging(
    config: TrainConfig, method: Method, dialog: Dialog | SingleTurn, compute: Compute, ranks: Ranks = ALONE
) -> Judging:
    """The judging with the start model of a run, placed and ready for training. ranks: the ranks that train it
    together. Raises ConfigError if the options do not allow this number of ranks or this device, and ModelError if the
    model cannot be loaded or cannot run the layout.
    """
    layout = Layout(
        config.packing,
        config.token_budget,
        dialog.pad_id,
        compute.device,
        mask_truncated=config.truncated_thoughts == "mask",
    )
    refused = config.refusal(sharded=ranks.mesh is not None, cuda=compute.device.type == "cuda")
    if refused:
        raise ConfigError(refused)
    lora = None
    if config.use_peft:
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
        lora,
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
    return judging
