"""What methods that train a language model on its own thoughts have in common."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from dwrl_fast.batching.batch import Batch
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Request
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods.method import Method
from dwrl_fast.methods.method_options import RatioOptions, SamplingOptions, WritingOptions
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.models.heads import HeadInputs
from dwrl_fast.options import Options


class GenerativeMethod(Method):
    """n thoughts per context, sampled by the current model."""

    options: ClassVar[tuple[type[Options], ...]] = (WritingOptions, SamplingOptions)
    card_options: ClassVar[tuple[str, ...]] = ("temperature", "max_completion_length")
    preparation = "sample thoughts"
    thinks = True

    @classmethod
    def validate(cls, config: Any) -> None:
        if cls.contrasts and config.num_generations < 2:
            raise ConfigError(
                "num_generations = 1: with one thought there is nothing to compare it with (its weight is 1 and its "
                "advantage 0), so no thought would be learned. Give at least 2 (the papers use 4)."
            )

    @property
    def thoughts_each(self) -> int:
        return self.config.num_generations if self.trains else 0

    def figures(
        self, rows: Sequence[Preference], requests: Sequence[Request], sampled: list[Group], kept: list[Group],
        unread: int,
    ) -> dict[str, float]:  # fmt: skip
        """The mean length of thoughts in tokens, and the share that was cut at the limit."""
        ended = [thought.ended for group in sampled for some in group.thoughts for thought in some]
        sizes = [one.thought.stop - one.thought.start for group in sampled for one in group.flat]
        if not sizes:
            return {}
        return {
            "thought_length": sum(sizes) / len(sizes),
            "thought_tokens": float(sum(sizes)),
            "truncation_rate": 1 - sum(ended) / len(ended),
        }


class ClippedMethod(GenerativeMethod):
    """The clipped objective over the tokens of thoughts; the ratio is relative to the policy that sampled them."""

    options = (*GenerativeMethod.options, RatioOptions)
    contrasts = True
    old_policy = "sampler"

    @property
    def trained_temperature(self) -> float:
        return self.config.temperature

    def clipped_loss(
        self, head: HeadInputs, batch: Batch, advantage: Tensor, token_weight: Tensor, metrics: StepMetrics
    ) -> Tensor:
        """-sum_t weight min(g A, clip(g) A) (DWRL Eq. 14), from the advantage and the token weight of each sequence,
        both [S]; a scalar.
        """
        config = self.config
        assert batch.old_logprob is not None
        result = head.policy_loss(
            batch.targets,
            batch.old_logprob,
            advantage[batch.segment_ids],
            token_weight[batch.segment_ids],
            clip_low=config.epsilon,
            clip_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            temperature=self.trained_temperature,
        )
        metrics.policy.append(result.stats)
        return result.loss
