"""Token ids with named spans: contexts for sampling, and sequences for training and scoring."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Context:
    """The ids before a sampled thought or before a label.

    `prompt` spans everything before the response, `response` the text of the response. If two responses are shown,
    `response` is the first and `second` the other. `evaluate` spans the turn with the question; in a single-turn prompt
    this turn also contains the responses.
    """

    ids: list[int]
    prompt: slice
    response: slice
    evaluate: slice
    second: slice | None = None
    aspect: str | None = None  # of the rate turn; None: the aspect of the dialog


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A sequence to train on, or to score at its last id.

    `prompt` and `response` are the spans of the context, `thought` spans the trained ids (including a sampled
    end-of-turn), and `rate` spans the text of the rate turn.
    """

    ids: list[int]
    prompt: slice
    response: slice
    thought: slice
    rate: slice
