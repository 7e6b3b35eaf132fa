"""`dwrl`: Dual-Weighted RL (docs/method.md, 2). Thoughts are sampled; then score and thoughts are trained alternately
or jointly.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods.generative import ClippedMethod
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.models.heads import HeadInputs
from dwrl_fast.objectives.agreement import order_credit, rank_grid
from dwrl_fast.objectives.dual_weighted import (
    centred_reward,
    effective_coefficients,
    score_objective,
    standardised_reward,
    thought_signal,
)
from dwrl_fast.objectives.likelihood import preference_likelihood
from dwrl_fast.ops import PreferenceWeights
from dwrl_fast.options import POSITIVE, Options, option

dwrl_option = partial(option, group="DWRL")
optimizer_option = partial(option, group="Optimizer")


@dataclass(frozen=True, kw_only=True)
class DualOptions(Options):
    """The options of `dwrl` and `btpo`. The defaults are the paper's."""

    alternate: Literal["minibatch", "rollout", "joint"] = dwrl_option(
        "minibatch",
        "Order of the two phases: A trains the score, B trains the thoughts. minibatch: A, then B, on each minibatch."
        " rollout: A on all minibatches of a rollout batch, then B. joint: both in one update.",
    )
    joint_reward: Literal["centred", "standardised"] = dwrl_option(
        "standardised",
        "Advantage of a thought. centred: its weight minus 1/n. standardised: also divided by the standard deviation.",
        needs=("alternate", "joint"),
    )
    misalignment_weight: bool = dwrl_option(
        True,
        "Weight each pair by the probability that the model orders it incorrectly. off: the paper's ablation.",
    )
    score_normalization: Literal["vocab", "yes_no"] = dwrl_option(
        "vocab",
        "The score is log p(Yes). vocab: p over the whole vocabulary, as in the paper. yes_no: over Yes and No only.",
    )
    thought_normalization: Literal["paper", "likelihood"] = dwrl_option(
        "paper",
        "paper: average over the n thoughts and over their tokens. likelihood: sums; A and B together are then the"
        " consistent estimator of the marginal likelihood's gradient, and B is far larger.",
    )
    score_learning_rate: float | None = optimizer_option(
        None, "Peak learning rate of phase A. none: --learning_rate.", bound=POSITIVE
    )
    thought_learning_rate: float | None = optimizer_option(
        None, "Peak learning rate of phase B. none: --learning_rate.", bound=POSITIVE
    )
    optimizer_state: Literal["shared", "per_phase"] = optimizer_option(
        "shared",
        "AdamW state of the two phases. Gradients of A are often ten times larger than those of B, so with a shared "
        "state A's second moment makes the steps of B small. per_phase: separate states, 8 bytes a parameter more.",
    )


class DualWeightedRL(ClippedMethod):
    """Trains scores and thoughts alternately or jointly with the weights of DWRL Eq. 12."""

    name = "dwrl"
    summary = "thoughts and score are trained together, with weights for pairs and thoughts"
    options = (*ClippedMethod.options, DualOptions)
    card_options = (*ClippedMethod.card_options, "score_normalization")
    verdict = "label after a thought"

    @classmethod
    def validate(cls, config: Any) -> None:
        super().validate(config)
        phased = [
            name for name in ("score_learning_rate", "thought_learning_rate") if getattr(config, name) is not None
        ]
        phased += ["optimizer_state = per_phase"] if config.optimizer_state == "per_phase" else []
        if config.alternate == "joint" and phased:
            raise ConfigError(
                f"{' and '.join(phased)} with alternate = joint: its one update holds both terms, and has one"
                " learning rate and one optimizer state. Use --learning_rate and --optimizer_state shared, or another"
                " --alternate."
            )

    @classmethod
    def embedded_recipe(cls, given: dict[str, Any]) -> str:
        return "btpo" if given.get("alternate") == "joint" else cls.name

    @property
    def phases(self) -> tuple[str, ...]:
        return ("joint",) if self.config.alternate == "joint" else ("score", "thought")

    @property
    def phase_by_phase(self) -> bool:
        return self.config.alternate == "rollout"

    @property
    def separate_states(self) -> bool:
        return self.config.optimizer_state == "per_phase"

    def learning_rate(self, phase: str) -> float:
        own = {"score": self.config.score_learning_rate, "thought": self.config.thought_learning_rate}.get(phase)
        return self.config.learning_rate if own is None else own

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """Phase `score` is DWRL Eq. 13, `thought` Eq. 14, `joint` their sum; each is a mean over preference groups."""
        groups = minibatch.groups
        head = model(batch, tokens=phase != "score")
        labels, normalization = self.dialog.label_ids, self.config.score_normalization
        if phase == "thought":  # it computes the weights from its own forward pass, but does not train the score
            with torch.no_grad():
                scores = head.scores(labels, normalization)
        else:
            scores, mass = head.scores_and_mass(labels, normalization)
            metrics.add("label_mass", mass)
            metrics.add_scores(batch, scores)
        grid = batch.grid(scores)
        ranks = [group.ranks for group in batch.groups]
        likelihood = preference_likelihood(ranks, [group.preference.margin for group in batch.groups])
        weights = ops.preference_weights(likelihood, grid, batch.valid)
        c = effective_coefficients(weights.coefficients, self.config.misalignment_weight)
        total = grid.new_zeros(())
        if phase != "thought":
            total = total + score_objective(grid, c, weights.weights, batch.valid) / groups
            metrics.add("score_loss", total * groups, count=len(batch.groups))
            self._add_scores(metrics, weights, c, rank_grid(ranks).to(c.device, non_blocking=True))
        if phase != "score":
            thought = self._thought_loss(head, batch, c, weights.weights, groups, metrics)
            metrics.add("thought_loss", thought * groups, count=len(batch.groups))
            total = total + thought
        return total

    def _thought_loss(
        self, head: HeadInputs, batch: Batch, c: Tensor, weights: Tensor, groups: int, metrics: StepMetrics
    ) -> Tensor:
        config = self.config
        standardised = config.alternate == "joint" and config.joint_reward == "standardised"
        reward = (standardised_reward if standardised else centred_reward)(weights, batch.valid)
        signal = thought_signal(
            c, reward, batch.grid(batch.lengths), batch.valid, batch.grid(batch.trained), config.thought_normalization
        )
        advantage, weight = batch.flat(signal.advantage), batch.flat(signal.token_weight) / groups
        metrics.add("advantage", advantage.abs())
        return self.clipped_loss(head, batch, advantage, weight, metrics)

    def _add_scores(self, metrics: StepMetrics, weights: PreferenceWeights, c: Tensor, ranks: Tensor) -> None:
        best = ranks == 1
        metrics.add("loss", weights.losses)
        metrics.add("p_chosen", weights.marginals.exp(), where=best)
        metrics.add("p_rejected", weights.marginals.exp(), where=ranks > 1)
        metrics.add("misalignment", (weights.coefficients * best).sum(-1))
        pull = c.abs().sum(-1) / 2  # |c| of either side of a pair
        metrics.add("pair_weight", pull)
        metrics.add("pair_weight_squared", pull.square())
        accuracy, ordered = order_credit(weights.marginals, ranks)
        metrics.add("train_accuracy", accuracy, where=ordered)
