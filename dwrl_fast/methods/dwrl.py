"""`dwrl`: Dual-Weighted RL (docs/method.md, 2). Thoughts are sampled, the score and the thoughts are trained in turn or
jointly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, response_contexts
from dwrl_fast.methods.generative import GenerativeMethod
from dwrl_fast.methods.method import Tally
from dwrl_fast.models.model import HeadInputs
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
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring import GenerativeScorer, Progress, Runtime, Scorer, fill_scores, read_scores


class DualWeightedRL(GenerativeMethod):
    name = "dwrl"
    card_options = (*GenerativeMethod.card_options, "score_normalization")

    @classmethod
    def make_scorer(cls, runtime: Runtime, card: dict[str, Any]) -> Scorer:
        return GenerativeScorer(
            runtime, card["score_normalization"], card["temperature"], card["max_completion_length"]
        )

    @property
    def phases(self) -> tuple[str, ...]:
        return ("joint",) if self.config.alternate == "joint" else ("score", "thought")

    def learning_rate(self, phase: str) -> float:
        own = {"score": self.config.score_learning_rate, "thought": self.config.thought_learning_rate}.get(phase)
        return self.config.learning_rate if own is None else own

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        config = self.config
        groups = sample_groups(
            rows,
            response_contexts(rows, self.dialog),
            self.dialog,
            self.sampler,
            config.num_generations,
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            seed=seed,
            progress=progress,
        )
        return groups, self.sampled(groups)

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        groups = minibatch.groups
        head = self.model(batch, tokens=phase != "score")
        # Phase B reads the recomputed weights from its own forward, but does not train the score.
        with torch.set_grad_enabled(phase != "thought"):
            scores, mass = read_scores(head, self.dialog, self.config.score_normalization, mass=phase != "thought")
            grid = batch.grid(scores)
        ranks = [group.ranks for group in batch.groups]
        likelihood = preference_likelihood(ranks, [group.preference.margin for group in batch.groups])
        weights = ops.preference_weights(likelihood, grid, batch.valid)
        c = effective_coefficients(weights.coefficients, self.config.misalignment_weight)
        total = grid.new_zeros(())
        if phase != "thought":
            total = total + score_objective(grid, c, weights.weights, batch.valid) / groups
            tally.add("score_loss", total * groups, count=len(batch.groups))
            self._tally_scores(tally, weights, c, rank_grid(ranks).to(c.device, non_blocking=True))
            assert mass is not None
            tally.add("label_mass", mass)
            fill_scores(batch, scores)
        if phase != "score":
            thought = self._thought_loss(head, batch, c, weights.weights, groups, tally)
            tally.add("thought_loss", thought * groups, count=len(batch.groups))
            total = total + thought
        return total

    def _thought_loss(
        self, head: HeadInputs, batch: Batch, c: Tensor, weights: Tensor, groups: int, tally: Tally
    ) -> Tensor:
        config = self.config
        standardised = config.alternate == "joint" and config.joint_reward == "standardised"
        reward = (standardised_reward if standardised else centred_reward)(weights, batch.valid)
        signal = thought_signal(
            c, reward, batch.grid(batch.lengths), batch.valid, batch.grid(batch.trained), config.thought_normalization
        )
        advantage, weight = batch.flat(signal.advantage), batch.flat(signal.token_weight) / groups
        tally.add("advantage", advantage.abs())
        return self.clipped_loss(head, batch, advantage, weight, tally)

    def _tally_scores(self, tally: Tally, weights: PreferenceWeights, c: Tensor, ranks: Tensor) -> None:
        best = ranks == 1
        tally.add("loss", weights.losses)
        tally.add("p_chosen", weights.marginals.exp(), where=best)
        tally.add("p_rejected", weights.marginals.exp(), where=ranks > 1)
        tally.add("misalignment", (weights.coefficients * best).sum(-1))
        pull = c.abs().sum(-1) / 2  # |c| of either side of a pair
        tally.add("pair_weight", pull)
        tally.add("pair_weight_squared", pull.square())
        accuracy, ordered = order_credit(weights.marginals, ranks)
        tally.add("train_accuracy", accuracy, where=ordered)
