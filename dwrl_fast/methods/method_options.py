"""The options that several methods share. Options of a single method are in its own file."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dwrl_fast.options import OPEN_FRACTION, POSITIVE, Bound, Options, at_least, option, option_fields
from dwrl_fast.sampling.vllm import VllmSettings

method_option = partial(option, group="Method")
thoughts_option = partial(option, group="Generating thoughts")
vllm_option = partial(thoughts_option, needs=("use_vllm", True))


def cache_option() -> Any:
    """The field `generation_cache_gib`, for training and for the commands that judge."""
    return thoughts_option(
        4.0,
        "Maximum memory of the key-value cache in GiB while thoughts are generated. A thought waits until there is "
        "room for its full length. Affects memory and speed, not the result.",
        bound=POSITIVE,
    )


@dataclass(frozen=True, kw_only=True)
class VllmOptions(Options):
    """Options of vLLM, for all commands that write thoughts."""

    use_vllm: bool = thoughts_option(
        False,
        "Generate thoughts with vLLM instead of the package's own sampler. Useful when sampling takes most of the time."
        " vLLM gets the current weights before every rollout batch. See docs/vllm.md.",
    )
    vllm_mode: Literal["colocate", "server"] = vllm_option(
        "colocate",
        "The process of vLLM. colocate: in each training process and on its GPU; it sleeps during updates. server: in"
        " separate processes that you start first, on GPUs that are not used for training.",
    )
    vllm_server_base_url: tuple[str, ...] = vllm_option(
        ("http://127.0.0.1:8000",),
        "Addresses of the vLLM servers; the thoughts are split between them. Weights are sent through a folder under"
        " TMPDIR, which the servers must be able to read.",
        needs=("vllm_mode", "server"),
    )
    vllm_server_timeout: float = vllm_option(
        600.0,
        "Seconds to wait for a server to start, and for the answer to one request. Must exceed the time of the longest"
        " thought. After a timeout the request is sent twice more, then the run ends.",
        bound=POSITIVE,
        needs=("vllm_mode", "server"),
    )
    vllm_gpu_memory_utilization: float = vllm_option(
        0.3,
        "Share of the GPU's memory that vLLM in this process may use for its weights and cache. The trainer's weights"
        " and optimizer states stay on the GPU as well. On a CPU --generation_cache_gib sets the cache.",
        bound=OPEN_FRACTION,
        needs=("vllm_mode", "colocate"),
    )
    vllm_max_model_length: int | None = vllm_option(
        None,
        "Maximum tokens of one sequence in vLLM: prompt, response, thought and rate turn. none: the model's maximum"
        " positions. Lower it if vLLM reports too little memory for one such sequence.",
        bound=at_least(1),
    )

    @property
    def vllm_options(self) -> dict[str, Any]:
        """These options by name, as keyword arguments of `Scorer.from_pretrained`."""
        return {f.name: getattr(self, f.name) for f in option_fields(VllmOptions)}

    @property
    def vllm(self) -> VllmSettings | None:
        """The settings for the sampler; None without vLLM."""
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
    """Options of methods whose model writes thoughts, in training or when it judges."""

    max_completion_length: int = thoughts_option(
        1000,
        "Maximum tokens of a thought. A thought that is cut here is still followed by the rate turn and scored.",
        bound=Bound("in [1, 1000000]", lambda v: 1 <= v <= 1_000_000),
    )
    temperature: float = thoughts_option(
        1.0,
        "Sampling temperature of thoughts. Top-k, top-p and penalties are always off, whatever generation_config says:"
        " thoughts must come from the distribution that is trained.",
        bound=at_least(0.01),
    )
    generation_batch_size: int = thoughts_option(
        256, "Thoughts generated at the same time. Lower it if generation runs out of memory.", bound=at_least(1)
    )
    generation_cache_gib: float = cache_option()
    eval_votes: int = option(
        4,
        "Also evaluate with this many sampled thoughts: the mean of p(Yes), or the majority of the verdicts. 0: only "
        "with one greedy thought.",
        group="Evaluation",
        bound=at_least(0),
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """Options of methods that train on their own thoughts."""

    num_generations: int = thoughts_option(
        4, "Thoughts sampled per response, or per comparison. At least 2.", bound=at_least(1)
    )
    truncated_thoughts: Literal["keep", "mask"] = thoughts_option(
        "keep",
        "Thoughts that are cut at --max_completion_length. keep: train on their tokens. mask: do not; they are still"
        " scored and count in n. The star methods leave masked thoughts out.",
    )


@dataclass(frozen=True, kw_only=True)
class RatioOptions(Options):
    """Options of methods with the clipped objective."""

    epsilon: float = thoughts_option(
        0.2, "Lower clip bound of the probability ratio: 1 - epsilon.", bound=OPEN_FRACTION
    )
    epsilon_high: float | None = thoughts_option(
        None, "Upper clip bound of the probability ratio: 1 + epsilon_high. none: epsilon.", bound=POSITIVE
    )
    old_logprobs: Literal["auto", "recompute", "sampler"] = thoughts_option(
        "auto",
        "Source of the sampling policy's log-probabilities. recompute: one more forward pass before the first update. "
        "sampler: those of the sampler. auto: sampler if it computes in float32, otherwise recompute.",
    )
