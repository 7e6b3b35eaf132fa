"""What a vLLM that writes for us must do, wherever it runs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Weights = Iterable[tuple[str, Tensor]]
Sent = Callable[[], Weights]  # the weights as they are, each time it is called


class VllmSettings(NamedTuple):
    """What the options `vllm_*` say."""

    mode: Literal["colocate", "server"] = "colocate"
    base_url: tuple[str, ...] = ()
    timeout: float = 600.0
    gpu_memory_utilization: float = 0.3
    max_model_length: int | None = None


class Ask(NamedTuple):
    """One sequence to go on with, and its own draws. labels: token ids whose log-probs after `prompt` are wanted; then
    one token is drawn, by any seed, at temperature 1.
    """

    prompt: list[int]
    max_tokens: int = 1
    temperature: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()


class Answer(NamedTuple):
    """ids: what was drawn, with the stop token if one was. logprobs: of each, in nats. labels: those of the labels."""

    ids: list[int]
    logprobs: list[float]
    labels: tuple[float, ...] = ()


class Engine(Protocol):
    """One vLLM or several, whose weights are those that were loaded last.

    longest: the most tokens of a sequence. sleeps: whether weights and cache are given up between calls, by `sleep`.
    restarts: how often one of them was started again, and sent the last weights again.
    """

    longest: int
    sleeps: bool
    restarts: int

    def complete(self, asks: Sequence[Ask], done: Callable[[int], None]) -> list[Answer]:
        """The answers, in the order of `asks`, all of them whole. `done` is told the place of each that is finished, at
        least once. SamplerError where one cannot be had.
        """
        ...

    def load(self, weights: Sent, version: str) -> None:
        """Take over all `weights`, then forget every key and value that older ones left. All ranks call it together.
        SamplerError where any of it fails; then nothing is sampled before the next `load`.
        """
        ...

    def sleep(self) -> None:
        """Give up the memory of weights and cache until the next `load`."""
        ...

    def close(self) -> None:
        """Leave nothing running, and no file."""
        ...


def wrong(ask: Ask, answer: Answer) -> str:
    """What is missing in `answer`, in words; empty where nothing is."""
    if not answer.ids or len(answer.ids) != len(answer.logprobs):
        return f"{len(answer.ids)} tokens came with {len(answer.logprobs)} log-probs"
    if len(answer.labels) != len(ask.labels):
        return f"{len(answer.labels)} of {len(ask.labels)} labels came back"
    if any(token in ask.stop_ids for token in answer.ids[:-1]):
        return "a thought went on after its stop token"
    if answer.ids[-1] not in ask.stop_ids and len(answer.ids) != ask.max_tokens:
        return f"a thought ended after {len(answer.ids)} of {ask.max_tokens} tokens without a stop token"
    return ""
