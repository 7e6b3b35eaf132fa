"""`dpo`: a policy that prefers the better response, without a reward model (docs/methods.md).

The implicit reward beta (log pi(y | x) - log pi_ref(y | x)) takes the place of a reward, so every preference format has
the likelihood that it has for `bt`. The reference is the model that the run started from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group, completion_groups
from dwrl_fast.errors import ModelError
from dwrl_fast.log import warn_once
from dwrl_fast.methods.method import Method, Tally
from dwrl_fast.models.adapters import adapted
from dwrl_fast.models.liger import use_liger
from dwrl_fast.objectives.agreement import order_credit, rank_grid
from dwrl_fast.objectives.direct_preference import implicit_reward
from dwrl_fast.objectives.likelihood import preference_likelihood
from dwrl_fast.scoring import PolicyScorer, Progress, Runtime, Scorer, fill_scores
from dwrl_fast.scoring.policy import Reference, token_logprobs


class DirectPreference(Method):
    name = "dpo"
    card_options = ("beta",)
    preparation = "encode, reference"
    default_beta: ClassVar[float] = 0.22

    def __init__(self, config: TrainConfig, dialog: Dialog | SingleTurn, compute: Compute):
        super().__init__(config, dialog, compute)
        assert isinstance(self.scorer, PolicyScorer) and self.scorer.reference is not None
        self.reference = self.scorer.reference
        if config.use_liger_kernel and self.reference.runtime is not self.runtime:
            use_liger(self.reference.runtime.model.lm)

    @property
    def beta(self) -> float:
        return self.default_beta if self.config.beta is None else self.config.beta

    @classmethod
    def make_scorer(cls, runtime: Runtime, card: dict[str, Any]) -> Scorer:
        """The reference is the model without its adapters, if it has any. Otherwise it is loaded again: at the start of
        a run, when a run goes on, and for evaluation, the card names the model that the run started from.
        """
        if adapted(runtime.model.lm):
            return PolicyScorer(runtime, Reference(runtime), card["beta"])
        source = card["reference"]
        named = source["model_name_or_path"], source["model_config"], source["seed"]
        try:
            reference = cls.load(*named, runtime.dialog, runtime.compute, runtime.layout, sampling_batch=1)
        except ModelError as error:
            warn_once(
                "the model that this one was trained from is not found, so the scores are beta log pi(y | x), without "
                f"the reference's; accuracy and margin are those of another reward.\n  {error}"
            )
            return PolicyScorer(runtime, beta=card["beta"])
        reference.model.requires_grad_(False)
        return PolicyScorer(runtime, Reference(reference), card["beta"])

    @property
    def phases(self) -> tuple[str, ...]:
        return ("policy",)

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        groups = completion_groups(rows, self.dialog)
        self.reference.fill_logprobs(groups)
        progress(sum(len(group.sequences) for group in groups))
        return groups, {}

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        assert batch.old_logprob is not None
        logprob = token_logprobs(self.model(batch, tokens=True), batch)
        flat = implicit_reward(logprob, batch.old_logprob, batch.lengths, self.beta)
        fill_scores(batch, flat)
        rewards = batch.grid(flat)[..., 0]
        ranks = [group.ranks for group in batch.groups]
        losses = preference_likelihood(ranks, [group.preference.margin for group in batch.groups])(rewards)
        grid = rank_grid(ranks).to(rewards.device, non_blocking=True)
        tally.add("loss", losses)
        accuracy, ordered = order_credit(rewards, grid)
        tally.add("reward_chosen", rewards, where=grid == 1)
        tally.add("reward_rejected", rewards, where=grid > 1)
        tally.add("train_accuracy", accuracy, where=ordered)
        return losses.sum() / minibatch.groups

    def card(self) -> dict[str, Any]:
        """With where the reference is found: the options that named it, and the seed of one whose weights are drawn."""
        config = self.config
        names = {"model_name_or_path": config.model_name_or_path, "model_config": config.model_config}
        reference = {k: str(Path(v).resolve()) if v and Path(v).exists() else v for k, v in names.items()}
        return super().card() | {"beta": self.beta, "reference": reference | {"seed": config.seed}}
