"""A thought that a model wrote."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thought:
    """ids: its tokens, with the stop token when one was sampled. logprobs: nats, one a token, under the policy that the
    trained one's ratio is taken to: as sampled, or as computed again; empty where no ratio is taken. ended: whether a
    stop token was sampled before the limit. reward: what a method gives for it; None where it gives none. score: log
    p(Yes) after it in nats, where the sampler read it.

    Of a policy that is trained on responses, the response stands in its place.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool
    reward: float | None = None
    score: float | None = None
