"""What is sampled from, and what is trained on or scored: token ids with named spans."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Context:
    """What a thought is sampled from, or a label read after.

    `prompt` is all that precedes the response, `response` the ids of its text; where two are shown, those of the first,
    and `second` of the other. `evaluate` spans the turn that asks; where it is the only one it shows them itself.
    """

    ids: list[int]
    prompt: slice
    response: slice
    evaluate: slice
    second: slice | None = None
    aspect: str | None = None  # the rate turn's; None is the dialog's own


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """What is trained on, or scored at the last id.

    `prompt` and `response` are those of the context, `thought` spans the trained ids (with a sampled end-of-turn) and
    `rate` the text of the rate turn.
    """

    ids: list[int]
    prompt: slice
    response: slice
    thought: slice
    rate: slice
