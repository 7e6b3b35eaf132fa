"""AdamW with a learning rate per phase, one state for all phases or one per phase, and a schedule over minibatches."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dwrl_fast.config import TrainConfig
from dwrl_fast.methods import Method


class Optimizers:
    """The optimizers of all phases over one model.

    total: the number of minibatches of the whole run, the length of the schedule. All phases of a minibatch have the
    same factor.
    """

    def __init__(self, model: nn.Module, method: Method, config: TrainConfig, total: int):
        self.config, self.total = config, total
        self.rates = {phase: method.learning_rate(phase) for phase in method.phases}
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        states = method.phases if method.separate_states or not method.phases else ("shared",)
        made = {state: self._adamw() for state in states}
        self.of_phase = {phase: made.get(phase) or made["shared"] for phase in method.phases}
        self.made = made
        self.last_rates: dict[str, float] = {}

    def _adamw(self) -> torch.optim.AdamW:
        config = self.config
        adamw = torch.optim.AdamW(
            self.named.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # The state exists from the start, so that every checkpoint has the same tensors.
        for p in self.named.values():
            adamw.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return adamw

    def step(self, phase: str, minibatch: int, used: float = 0.0) -> None:
        """One AdamW step of `phase` with the schedule's factor (see `factor`). Frees the gradients."""
        adamw = self.of_phase[phase]
        self.last_rates[phase] = self.rates[phase] * self.factor(minibatch, used)
        for group in adamw.param_groups:
            group["lr"] = self.last_rates[phase]
        adamw.step()
        self.clear()

    def clear(self) -> None:
        """Free the gradients."""
        for p in self.named.values():
            p.grad = None

    def clip(self) -> Tensor:
        """Scale the gradients down to --max_grad_norm. Returns their norm before clipping, on the device."""
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.config.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def factor(self, minibatch: int, used: float = 0.0) -> float:
        """The learning rate as a fraction of its peak, at `minibatch` or at the share `used` of the run's time,
        whichever is later.
        """
        warmup, floor = self.config.warmup_steps, self.config.min_learning_rate_ratio
        if minibatch < warmup:
            return (minibatch + 1) / warmup
        done = min(1.0, max(used, (minibatch - warmup) / max(1, self.total - warmup)))
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
            self.config.lr_scheduler_type
        ]
        return floor + (1 - floor) * shape

    def tensors(self) -> dict[str, Tensor]:
        """All state tensors by unique names, for checkpoints."""
        return {
            f"optimizer.{state}.{name}.{key}": adamw.state[p][key]
            for state, adamw in self.made.items()
            for name, p in self.named.items()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
