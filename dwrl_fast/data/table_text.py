"""Cells of text-only tables such as CSV: the text of a cell may represent a number, a list or messages."""

import json
import re
from functools import cached_property
from typing import Any

TRANSCRIPT = re.compile(r"\s*(?:Human|Assistant):")
JSON_MESSAGES = re.compile(r'\s*\[?\s*\{\s*"(?:role|from|content|value)"\s*:')  # text that looks like messages


def is_transcript(value: Any) -> bool:
    """Whether a text is a conversation with turns headed Human: and Assistant:."""
    return isinstance(value, str) and TRANSCRIPT.match(value) is not None and "Assistant:" in value


def parsed(value: Any) -> Any:
    """The value that a cell represents; any other value unchanged."""
    return value.parsed if isinstance(value, Cell) else value


def truth(value: Any) -> bool | None:
    """Whether a value is true, also as the word in any case: pandas writes True. None if it is neither true nor
    false.
    """
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


class Cell(str):
    """The text of a cell, and the value that it represents."""

    @cached_property
    def parsed(self) -> Any:
        """The JSON value that the text is, or the text itself."""
        try:
            return json.loads(self)
        except (ValueError, RecursionError):
            return self
