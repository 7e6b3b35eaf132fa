"""A sampler with given thoughts, and a policy that returns its gradient instead of taking a step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dwrl_fast.batching.batch import Size
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Thought
from dwrl_fast.methods import METHODS, StepMetrics
from dwrl_fast.progress import Display
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.training.policy import load_judging
from dwrl_fast.training.rollout import Rollout

CUT = " cut"  # suffix of a thought that was cut at the limit


class FakeSampler:
    """says(context as text, i) is the i-th thought about it."""

    float32 = True

    def __init__(self, dialog: Any, says: Callable[[str, int], str]) -> None:
        self.dialog, self.says = dialog, says

    def sample(self, contexts: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[Thought]]:
        asked = [self.dialog.tokenizer.decode(list(ids)) for ids in contexts]
        if options.get("progress") is not None:
            options["progress"](len(asked))
        return [[self._thought(self.says(text, i)) for i in range(n)] for text in asked]

    def _thought(self, text: str) -> Thought:
        ids = self.dialog.tokenizer.encode(text.removesuffix(CUT))
        ids += [] if text.endswith(CUT) else [self.dialog.end_id]
        return Thought(ids, [0.0] * len(ids), not text.endswith(CUT))


class FakePolicy:
    """A method on the model that `config` names. says: gives its thoughts instead of sampling (see FakeSampler)."""

    def __init__(
        self,
        config: TrainConfig,
        dialog: Any = None,
        says: Callable[[str, int], str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.dialog = load_dialog(config) if dialog is None else dialog
        self.method: Any = METHODS[config.method](config, self.dialog)
        self.judging: Any = load_judging(config, self.method, self.dialog, Compute.resolve(config.dtype), ranks)
        self.runtime, self.model = self.judging.runtime, self.judging.runtime.model
        self.roll_out = Rollout(self.method, self.judging)
        if says is not None:
            self.roll_out.sampler = FakeSampler(self.method.question, says)

    def rollout(self, rows: Sequence[Preference], seed: int = 0) -> tuple[list[Group], dict[str, float]]:
        return self.roll_out(rows, seed, Display())

    def batches(self, groups: Sequence[Group], budget: int = 10**6) -> list[Any]:
        return dataclasses.replace(self.runtime.layout, token_budget=budget).batches(groups)

    def step(
        self, groups: Sequence[Group], phase: str | None = None, budget: int = 10**6
    ) -> tuple[float, dict[str, Tensor], StepMetrics]:
        """Loss, gradients by name and figures of one minibatch, in micro-batches of at most `budget` tokens."""
        batches, total, metrics = self.batches(groups, budget), 0.0, StepMetrics()
        for batch in batches:
            with self.runtime.compute.autocast():
                loss = self.method.loss(phase or self.method.phases[0], self.model, batch, Size.of(groups), metrics)
            loss.backward()
            total += loss.item()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return total, found, metrics
