"""What a caller in Python gives, prompts and responses in lists, checked as the rows of a file are."""

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
    """DataError where `values`, which the caller knows as `name`, are no list or an empty one."""
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__"):
        raise DataError(f"{name} should be a list with one entry per response, not a {type(values).__name__}")
    if not len(values):
        raise DataError(f"{name} is empty: there is nothing to score")
    return list(values)


def as_responses(name: str, values: Any, count: int | None = None) -> list[str]:
    """DataError where they are no list of responses, `count` of them if it is given."""
    found = as_list(name, values)
    if count is not None and len(found) != count:
        raise DataError(f"{name} has {len(found)} texts for {count} responses: give one per response")
    return [as_response(f"{name}[{i}]", value) for i, value in enumerate(found)]


def as_response(name: str, value: Any) -> str:
    """The text of a response: a string, or a list with one turn of the assistant. DataError where it is neither."""
    if not isinstance(value, str | list | tuple):
        kind = type(value).__name__
        raise DataError(f"{name} should be a string or a list with one assistant turn, not the {kind} {value!r:.60}")
    with _named(name):
        turns = _turns(name, value, "assistant")
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise Unusable("not one assistant turn")
        return turns[0]["content"]


def as_prompt(name: str, prompt: Any) -> tuple[Turns, str]:
    """The turns that a response answers, and how it begins: a last turn of the assistant is the beginning of every
    response (a prefilled answer), else that is empty. A string is one turn of the user. DataError where the prompt is
    no conversation.
    """
    with _named(name):
        turns = _turns(name, prompt, "user")
        begun = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
        check_prompt(turns)
        return tuple(turns), begun


def unusable(error: DataError) -> str:
    """Why a row cannot be judged, in words that many such rows share."""
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
