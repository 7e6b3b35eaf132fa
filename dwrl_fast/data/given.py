"""What a caller in Python gives, prompts and texts in lists, checked as the rows of a file are."""

from collections.abc import Sequence
from typing import Any

from dwrl_fast.data.columns import Columns, Unusable, check_prompt, check_text
from dwrl_fast.data.preference import Message
from dwrl_fast.errors import DataError

Prompt = str | Sequence[Message]
Turns = tuple[Message, ...]


def as_list(name: str, values: Any) -> list[Any]:
    """DataError where `values`, which the caller knows as `name`, are no list or an empty one."""
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__"):
        raise DataError(f"{name} should be a list, with one for each response, not a {type(values).__name__}")
    if not len(values):
        raise DataError(f"{name} is empty: there is nothing to score")
    return list(values)


def as_texts(name: str, values: Any, count: int | None = None) -> list[str]:
    """DataError where they are no list of strings, `count` of them if it is given, or one is empty."""
    found = as_list(name, values)
    if count is not None and len(found) != count:
        raise DataError(f"{name} has {len(found)} texts for {count} responses: give one for each")
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"{name}[{i}] should be a string, not the {type(text).__name__} {text!r:.60}")
        try:
            check_text(text)
        except Unusable as error:
            raise DataError(f"{name}[{i}]: {error}") from None
    return found


def as_turns(name: str, prompt: Any) -> Turns:
    """A string is one turn of the user. DataError where the prompt is no conversation."""
    try:
        found = Columns({}, name, {}).as_turns("prompt", list(prompt) if isinstance(prompt, tuple) else prompt, "user")
        check_prompt(found)
    except Unusable as error:
        raise DataError(f"{name}: {error}") from None
    return tuple(found)
