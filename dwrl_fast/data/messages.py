"""Converts other forms of messages to this package's form: objects with `from` and `value`, content in parts,
transcripts.

Any other value is returned unchanged, and the reader then checks it.
"""

import re
from collections.abc import Mapping
from typing import Any

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.preference import Message
from dwrl_fast.data.table_text import JSON_MESSAGES, Cell

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
}
TURN = re.compile(r"\n\n(Human|Assistant):")


def turns(value: Any) -> Any:
    """A list of messages, from a single message or a list of messages in any form. Text is returned unchanged."""
    if is_message(value):
        return [message(value)]
    return [message(each) for each in value] if isinstance(value, list) else value


def from_text(value: Any) -> Any:
    """Parse messages that `datasets` returns as JSON text because their keys differ from row to row."""
    if isinstance(value, list):
        return [from_text(each) for each in value] if any(isinstance(each, str) for each in value) else value
    if not isinstance(value, str) or not JSON_MESSAGES.match(value):
        return value
    parsed = Cell(value).parsed
    several = isinstance(parsed, list) and all(map(is_message, parsed))
    return parsed if several or is_message(parsed) else value


def is_message(value: Any) -> bool:
    """Whether it is one message: an object with role and content, or with from and value."""
    return isinstance(value, Mapping) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def message(value: Any) -> Any:
    """One message in this package's form. Raises Unusable if a part of its content is not text."""
    if not is_message(value):
        return value
    if "role" not in value:
        value = {name: each for name, each in value.items() if name not in ("from", "value")} | {
            "role": value["from"],
            "content": value["value"],
        }
    known = role_of(value)
    return joined(value if known == value["role"] else {**value, "role": known})


def role_of(value: Any) -> Any:
    """The role of a message under this package's name; unchanged if the role is unknown. None for a value that is not a
    message.
    """
    role = (value.get("role") or value.get("from")) if isinstance(value, Mapping) else None
    return ROLES.get(role.lower(), role) if isinstance(role, str) else role


def joined(value: Any) -> Any:
    """Join the content parts of a message into one text. Raises Unusable if a part is not text."""
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), list | tuple):
        return value
    texts = [_text(part) for part in value["content"]]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("a content part that is not text")
    return {**value, "content": "".join(texts)}


def _text(part: Any) -> Any:
    return part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None


def transcript(text: str) -> list[Message]:
    """The turns of a transcript with the headings Human: and Assistant:. Raises Unusable if the text is not a
    transcript.
    """
    before, *rest = TURN.split("\n\n" + text.lstrip())
    if before.strip() or not rest:
        raise Unusable("not a transcript that begins with Human: or Assistant:")
    return [
        Message(role="user" if role == "Human" else "assistant", content=said.strip())
        for role, said in zip(rest[::2], rest[1::2], strict=True)
    ]
