"""The interface of a vLLM engine, in this process or on servers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Weights = Iterable[tuple[str, Tensor]]
Sent = Callable[[], Weights]  # returns the current weights at each call


class VllmSettings(NamedTuple):
    """The values of the options `vllm_*`."""

    mode: Literal["colocate", "server"] = "colocate"
    base_url: tuple[str, ...] = ()
    timeout: float = 600.0
    gpu_memory_utilization: float = 0.3
    max_model_length: int | None = None


class Ask(NamedTuple):
    """One request: a sequence to continue, with its own seed. labels: token ids whose log-probs after `prompt` are
    requested; then one token is drawn, with any seed, at temperature 1.
    """

    prompt: list[int]
    max_tokens: int = 1
    temperature: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()


class Answer(NamedTuple):
    """ids: the sampled tokens, including a sampled stop token. logprobs: of each token, in nats. labels: log-probs of
    the labels.
    """

    ids: list[int]
    logprobs: list[float]
    labels: tuple[float, ...] = ()


class Engine(Protocol):
    """One or several vLLM instances with the weights that were loaded last.

    longest: the most tokens of a sequence. sleeps: whether weights and cache are given up between calls, by `sleep`.
    restarts: how often one of them was started again, and sent the last weights again.
    """

    longest: int
    sleeps: bool
    restarts: int

    def complete(self, asks: Sequence[Ask], done: Callable[[int], None]) -> list[Answer]:
        """All answers, complete, in the order of `asks`. `done` is called at least once with the index of each finished
        answer. Raises SamplerError if an answer cannot be obtained.
        """
        ...

    def load(self, weights: Sent, version: str) -> None:
        """Load all `weights`, then reset the prefix cache, which holds keys and values of older weights. All ranks call
        this together. Raises SamplerError if any part fails; then nothing is sampled before the next `load`.
        """
        ...

    def sleep(self) -> None:
        """Free the memory of weights and cache until the next `load`."""
        ...

    def close(self) -> None:
        """Stop everything and remove temporary files."""
        ...


def wrong(ask: Ask, answer: Answer) -> str:
    """What is missing in `answer`, in words; empty if it is complete."""
    if not answer.ids or len(answer.ids) != len(answer.logprobs):
        return f"{len(answer.ids)} tokens came with {len(answer.logprobs)} log-probs"
    if len(answer.labels) != len(ask.labels):
        return f"{len(answer.labels)} of {len(ask.labels)} labels came back"
    if any(token in ask.stop_ids for token in answer.ids[:-1]):
        return "a thought went on after its stop token"
    if answer.ids[-1] not in ask.stop_ids and len(answer.ids) != ask.max_tokens:
        return f"a thought ended after {len(answer.ids)} of {ask.max_tokens} tokens without a stop token"
    return ""
