"""Artificial groups with the planned lengths, which are laid out and traced instead of rows."""

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from dwrl_fast.data import Preference
from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode import Group
from dwrl_fast.methods import Method

# Tokens of the evaluate turn with the thought's header, and of everything after the thought, for Qwen2.5.
ASKED, CLOSED = 55, 34


class Lengths(NamedTuple):
    """Tokens of a prompt, of each of two responses, and of a thought, on average."""

    prompt: int
    response: int
    thought: int


class Contexts(NamedTuple):
    """The contexts of one group for sampling: their number, their tokens with shared prefixes counted once, and the
    tokens of the longest.
    """

    number: int
    tokens: int
    longest: int


def contexts(lengths: Lengths, method: Method) -> Contexts:
    """The contexts of a group under `method`."""
    if method.template in ("pairwise", "direct"):
        size = lengths.prompt + 2 * lengths.response + ASKED
        return Contexts(1, size, size)
    size = lengths.response + ASKED
    return Contexts(2, lengths.prompt + 2 * size, lengths.prompt + size)


def groups(lengths: Lengths, method: Method, number: int, vocabulary: int = 1 << 40) -> list[Group]:
    """`number` groups of a prompt and two responses, which share nothing with each other. Ids are below `vocabulary`
    and wrap around.
    """
    ids = (i % vocabulary for i in count())
    return [_group(lengths, method, ids) for _ in range(number)]


def _group(lengths: Lengths, method: Method, ids: Iterator[int]) -> Group:
    def draw(size: int) -> list[int]:
        return [next(ids) for _ in range(size)]

    prompt = draw(lengths.prompt)
    responses = [draw(lengths.response), draw(lengths.response)]
    asks = method.thoughts_each > 0 or method.verdict.startswith(("label", "lead"))
    if method.template in ("pairwise", "direct"):
        responses = [responses[0] + responses[1]]
    closed = CLOSED if method.verdict == "label after a thought" else 0
    sequences = []
    for response in responses:
        context = prompt + response + draw(ASKED * asks)
        some = []
        for _ in range(max(1, method.thoughts_each)):
            thought = draw(lengths.thought) if method.thoughts_each else []
            start, stop = len(context), len(context) + len(thought)
            if method.verdict == "likelihood":  # the response is trained
                start, stop = len(prompt), len(context)
            whole = context + thought + draw(closed)
            none = slice(0, 0)
            some.append(TokenSequence(whole, slice(0, len(prompt)), none, slice(start, stop), none))
        sequences.append(some)
    return Group(Preference((), ("", "")), sequences)
