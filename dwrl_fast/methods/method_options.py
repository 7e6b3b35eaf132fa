"""The options that several methods share. Those of one method stand in its own file."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dwrl_fast.options import OPEN_FRACTION, POSITIVE, Bound, Options, at_least, option, option_fields
from dwrl_fast.sampling.vllm import VllmSettings

method_option = partial(option, group="Method")
thoughts_option = partial(option, group="Generating thoughts")
vllm_option = partial(thoughts_option, needs=("use_vllm", True))


def cache_option() -> Any:
    """The field `generation_cache_gib`, of training and of the commands that judge."""
    return thoughts_option(
        4.0,
        "The most memory in GiB that keys and values take while thoughts are generated. A thought waits until there is "
        "room for its full length, so this sets memory and speed, not the result.",
        bound=POSITIVE,
    )


@dataclass(frozen=True, kw_only=True)
class VllmOptions(Options):
    """Of whatever writes thoughts: that vLLM writes them."""

    use_vllm: bool = thoughts_option(
        False,
        "Let vLLM write the thoughts of the model that is trained or evaluated, in place of this package's own sampler:"
        " for models and lengths whose thoughts take most of the time. It gets the weights before every round of"
        " thoughts in which they have changed. See docs/vllm.md.",
    )
    vllm_mode: Literal["colocate", "server"] = vllm_option(
        "colocate",
        "Where vLLM runs. colocate: in this process and on its GPU, asleep while the model is trained; of several ranks"
        " each has one. server: in processes of its own, on GPUs that train nothing, which you start before.",
    )
    vllm_server_base_url: tuple[str, ...] = vllm_option(
        ("http://127.0.0.1:8000",),
        "Addresses of vLLM servers, which share the thoughts. Weights go to them through a folder under TMPDIR, which"
        " they must see too.",
        needs=("vllm_mode", "server"),
    )
    vllm_server_timeout: float = vllm_option(
        600.0,
        "Seconds that a server may take to come up, and to answer one request. It must exceed the time that the longest"
        " thought takes. A server that is silent for longer is asked twice more, then the run ends.",
        bound=POSITIVE,
        needs=("vllm_mode", "server"),
    )
    vllm_gpu_memory_utilization: float = vllm_option(
        0.3,
        "Share of the GPU's memory that vLLM in this process takes for weights and cache, while the trainer's weights"
        " and optimizer states stay there. On a CPU --generation_cache_gib says how much the cache takes.",
        bound=OPEN_FRACTION,
        needs=("vllm_mode", "colocate"),
    )
    vllm_max_model_length: int | None = vllm_option(
        None,
        "The most tokens that vLLM takes in one sequence: prompt, response, thought and what asks for the score. none:"
        " as many as the model has positions. Lower it where vLLM finds too little memory for one such sequence.",
        bound=at_least(1),
    )

    @property
    def vllm_options(self) -> dict[str, Any]:
        """These by name, as `Scorer.from_pretrained` takes them."""
        return {f.name: getattr(self, f.name) for f in option_fields(VllmOptions)}

    @property
    def vllm(self) -> VllmSettings | None:
        """What the sampler takes of these; None without vLLM."""
        if not self.use_vllm:
            return None
        return VllmSettings(
            self.vllm_mode,
            self.vllm_server_base_url,
            self.vllm_server_timeout,
            self.vllm_gpu_memory_utilization,
            self.vllm_max_model_length,
        )


@dataclass(frozen=True, kw_only=True)
class WritingOptions(VllmOptions):
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
