"""A thought that a model wrote."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thought:
    """ids: its tokens, including the stop token if one was sampled. logprobs: one per token, in nats, under the old
    policy of the probability ratio, as sampled or recomputed; empty if no ratio is needed. ended: whether a stop token
    was sampled before the limit. reward: the reward of the method; None if it gives none. score: log p(Yes) after the
    thought in nats, if the sampler read it.

    For a policy that is trained on responses, this is the response.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool
    reward: float | None = None
    score: float | None = None
