"""`bt`: a scalar head on the last token, trained by the likelihood of the rewards; nothing is sampled.

With --prefilled_thoughts the model as it was before training writes one greedy thought about each response, which the
head reads with it: its last token is then the one after which `dwrl` reads its score.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog
from dwrl_fast.encode import Group
from dwrl_fast.errors import ModelError
from dwrl_fast.methods.method import Method, Tally
from dwrl_fast.models.model import load_generative, place
from dwrl_fast.objectives.agreement import order_credit, rank_grid
from dwrl_fast.objectives.likelihood import preference_likelihood
from dwrl_fast.sampling.transformers import TransformersSampler
from dwrl_fast.scoring import PrefilledThoughts, Progress, Runtime, ScalarScorer, fill_scores

PREFILLED = "prefilled.jsonl"  # in the run's folder


class BradleyTerry(Method):
    name = "bt"
    scalar = True
    scorer: ScalarScorer
    preparation = "prepare inputs"

    def __init__(self, config: TrainConfig, dialog: Dialog, compute: Compute):
        super().__init__(config, dialog, compute)
        if self.scorer.thoughts is not None and config.output_dir is not None:
            self.scorer.thoughts.keep_in(Path(config.output_dir) / PREFILLED)

    @classmethod
    def make_scorer(cls, runtime: Runtime, card: dict[str, Any]) -> ScalarScorer:
        if "prefilled_by" not in card:
            return ScalarScorer(runtime)
        return ScalarScorer(runtime, _prefilled(runtime, card["prefilled_by"], card["max_completion_length"]))

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

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        return self.scorer.groups(rows, progress), {}

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        flat = self.model(batch)
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


def _prefilled(runtime: Runtime, writer: str, max_tokens: int) -> PrefilledThoughts:
    """Thoughts of the language model `writer`, which stands beside the one of `runtime` and stays as it is."""
    try:
        model = place(load_generative(writer, None, 0), runtime.compute, runtime.layout, thinks=True)
    except ModelError as error:
        raise ModelError(f"this model reads thoughts that {writer} writes, which must be there too. {error}") from error
    sampler = TransformersSampler(
        model.requires_grad_(False).lm,
        runtime.dialog.stop_ids,
        runtime.dialog.pad_id,
        batch_size=runtime.sampling_batch,
        autocast=runtime.compute.autocast,
    )
    return PrefilledThoughts(sampler, runtime.dialog, max_tokens)
