"""The options that several methods share. Those of one method stand in its own file."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dwrl_fast.options import OPEN_FRACTION, POSITIVE, Bound, Options, at_least, option

method_option = partial(option, group="Method")
thoughts_option = partial(option, group="Generating thoughts")


def cache_option() -> Any:
    """The field `generation_cache_gib`, of training and of the commands that judge."""
    return thoughts_option(
        4.0,
        "The most memory in GiB that keys and values take while thoughts are generated. A thought waits until there is "
        "room for its full length, so this sets memory and speed, not the result.",
        bound=POSITIVE,
    )


@dataclass(frozen=True, kw_only=True)
class WritingOptions(Options):
    """Of methods whose model writes thoughts, in training or when it judges."""

    max_completion_length: int = thoughts_option(
        1000,
        "The most tokens of a thought. One cut here is still followed by the rating turn and scored.",
        bound=Bound("in [1, 1000000]", lambda v: 1 <= v <= 1_000_000),
    )
    temperature: float = thoughts_option(
        1.0,
        "Of sampled thoughts. Top-k, top-p and penalties are always off, whatever the model's generation_config says:"
        " the thoughts must come from the distribution that is trained.",
        bound=at_least(0.01),
    )
    generation_batch_size: int = thoughts_option(
        256, "Thoughts generated at once. Lower it when generation runs out of memory.", bound=at_least(1)
    )
    generation_cache_gib: float = cache_option()
    eval_votes: int = option(
        4,
        "Beside the one greedy thought, also so many sampled ones: the mean of p(Yes), or the majority of the "
        "verdicts. 0: greedy only.",
        group="Evaluation",
        bound=at_least(0),
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """Of methods that are trained on thoughts of their own."""

    num_generations: int = thoughts_option(
        4, "Thoughts sampled for each response, or for each comparison. At least 2.", bound=at_least(1)
    )
    truncated_thoughts: Literal["keep", "mask"] = thoughts_option(
        "keep",
        "Whether the tokens of a thought cut at --max_completion_length are trained. Masked, it still counts in n and"
        " is scored; the star methods leave it out.",
    )


@dataclass(frozen=True, kw_only=True)
class RatioOptions(Options):
    """Of methods with the clipped objective."""

    epsilon: float = thoughts_option(
        0.2, "Clip range of the ratio to the sampling policy: 1 - epsilon.", bound=OPEN_FRACTION
    )
    epsilon_high: float | None = thoughts_option(
        None, "The upper side, 1 + epsilon_high. none: as epsilon.", bound=POSITIVE
    )
    old_logprobs: Literal["auto", "recompute", "sampler"] = thoughts_option(
        "auto",
        "Where the sampling policy's log-probabilities come from: recompute takes one more pass before the first "
        "update, sampler keeps the generator's own. auto: sampler where it computes in float32, otherwise recompute.",
    )
