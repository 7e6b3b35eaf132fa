"""A sampled thought."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thought:
    """ids: the sampled tokens, with the stop token when one was sampled. logprobs: nats, one a token, under the
    sampling distribution. ended: whether a stop token was sampled before the limit.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool
