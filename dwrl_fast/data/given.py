"""Checks prompts and responses that a caller in Python gives, with the same rules as for rows of a file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dwrl_fast.data.columns import Columns, Unusable, check_prompt
from dwrl_fast.data.messages import joined
from dwrl_fast.data.preference import Message
from dwrl_fast.errors import DataError

Prompt = str | Sequence[Message]
Response = str | Sequence[Message]
Turns = tuple[Message, ...]


def as_list(name: str, values: Any) -> list[Any]:
    """`values` as a list. Raises DataError, which calls them `name`, if they are not a list or are empty."""
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__"):
        raise DataError(f"{name} should be a list with one entry per response, not a {type(values).__name__}")
    if not len(values):
        raise DataError(f"{name} is empty: there is nothing to score")
    return list(values)


def as_responses(name: str, values: Any, count: int | None = None) -> list[str]:
    """`values` as response texts. Raises DataError if they are not a list of responses, or not `count` of them."""
    found = as_list(name, values)
    if count is not None and len(found) != count:
        raise DataError(f"{name} has {len(found)} texts for {count} responses: give one per response")
    return [as_response(f"{name}[{i}]", value) for i, value in enumerate(found)]


def as_response(name: str, value: Any) -> str:
    """The text of a response: a string, or a list with one assistant turn. Raises DataError for anything else."""
    if not isinstance(value, str | list | tuple):
        kind = type(value).__name__
        raise DataError(f"{name} should be a string or a list with one assistant turn, not the {kind} {value!r:.60}")
    with _named(name):
        turns = _turns(name, value, "assistant")
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise Unusable("not one assistant turn")
        return turns[0]["content"]


def as_prompt(name: str, prompt: Any) -> tuple[Turns, str]:
    """The turns of the prompt, and the beginning of every response: the last turn if it is an assistant turn (a
    prefilled answer), otherwise empty. A string is one user turn. Raises DataError if the prompt is not a conversation.
    """
    with _named(name):
        turns = _turns(name, prompt, "user")
        begun = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
        check_prompt(turns)
        return tuple(turns), begun


def unusable(error: DataError) -> str:
    """The reason why a row cannot be judged, in the same words for all such rows."""
    return str(error.__cause__) if isinstance(error.__cause__, Unusable) else "not in the expected form"


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Unusable as error:
        raise DataError(f"{name}: {error}") from error


def _turns(name: str, value: Any, role: str) -> list[Message]:
    if isinstance(value, list | tuple):
        value = [joined(message) for message in value]
    return Columns({}, name, {}).as_turns("prompt" if role == "user" else "response", value, role)
