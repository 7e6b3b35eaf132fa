"""`bt`: a scalar head on the last token, trained with the preference likelihood of the rewards; nothing is sampled.

With --prefilled_thoughts the untrained model writes one greedy thought about each response, and the head reads the
response with this thought. The head then reads the same last token as the score of `dwrl`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, plain_groups
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods.method import Method
from dwrl_fast.methods.method_options import method_option
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.objectives.agreement import order_credit, rank_grid
from dwrl_fast.objectives.likelihood import preference_likelihood
from dwrl_fast.options import Options


@dataclass(frozen=True, kw_only=True)
class PrefilledOptions(Options):
    """The options of `bt`."""

    prefilled_thoughts: bool = method_option(
        False,
        "Append to each response one greedy thought, written by the model before training. The thoughts are saved in "
        "OUTPUT_DIR/prefilled.jsonl. Do not move that model: later scoring needs it.",
    )


class BradleyTerry(Method):
    """A scalar reward, trained with the preference likelihood."""

    name = "bt"
    summary = "a scalar head with the Bradley-Terry loss, without thoughts"
    options = (PrefilledOptions,)
    scalar = True
    verdict = "reward"
    preparation = "prepare inputs"

    @classmethod
    def validate(cls, config: Any) -> None:
        if config.prefilled_thoughts and config.model_config is not None:
            raise ConfigError(
                "prefilled_thoughts with model_config: the thoughts are written by the model before training, and "
                "scoring later needs the same model. Give it as --model_name_or_path."
            )

    @classmethod
    def takes(cls, config: Any) -> frozenset[str]:
        return frozenset(("max_completion_length", "generation_batch_size") if config.prefilled_thoughts else ())

    @classmethod
    def embedded_recipe(cls, given: dict[str, Any]) -> str:
        return "bt-prefilled" if given.get("prefilled_thoughts") else cls.name

    @property
    def thoughts_each(self) -> int:
        return int(self.config.prefilled_thoughts)

    @property
    def sampling_temperature(self) -> float:
        return 0.0

    def card(self) -> dict[str, Any]:
        if not self.config.prefilled_thoughts:
            return super().card()
        writer = str(self.config.model_name_or_path)
        return super().card() | {
            "prefilled_by": str(Path(writer).resolve()) if Path(writer).is_dir() else writer,
            "max_completion_length": self.config.max_completion_length,
        }

    @property
    def phases(self) -> tuple[str, ...]:
        return ("score",)

    def groups(self, rows: Sequence[Preference], seed: int) -> list[Group]:
        return plain_groups(rows, self.dialog)

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        return reward_loss(batch, model(batch), metrics) / minibatch.groups


def reward_loss(batch: Batch, flat: Tensor, metrics: StepMetrics) -> Tensor:
    """The likelihood (docs/method.md, 2.1) of rewards [S], one per response, in nats: a scalar, summed over groups."""
    metrics.add_scores(batch, flat)
    rewards = batch.grid(flat)[..., 0]
    ranks = [group.ranks for group in batch.groups]
    losses = preference_likelihood(ranks, [group.preference.margin for group in batch.groups])(rewards)
    grid = rank_grid(ranks).to(rewards.device, non_blocking=True)
    metrics.add("loss", losses)
    accuracy, ordered = order_credit(rewards, grid)
    metrics.add("reward_chosen", rewards, where=grid == 1)
    metrics.add("reward_rejected", rewards, where=grid > 1)
    metrics.add("train_accuracy", accuracy, where=ordered)
    return losses.sum()
