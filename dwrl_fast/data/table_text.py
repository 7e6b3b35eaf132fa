"""A cell of a table that holds text alone, such as CSV: it may stand for a number, a list or messages."""

import json
import re
from functools import cached_property
from typing import Any

TRANSCRIPT = re.compile(r"\s*(?:Human|Assistant):")
JSON_MESSAGES = re.compile(r'\s*\[?\s*\{\s*"(?:role|from|content|value)"\s*:')  # what looks like messages


def is_transcript(value: Any) -> bool:
    """Whether a text is a conversation with turns headed Human: and Assistant:."""
    return isinstance(value, str) and TRANSCRIPT.match(value) is not None and "Assistant:" in value


def parsed(value: Any) -> Any:
    """What a cell stands for; any other value as it is."""
    return value.parsed if isinstance(value, Cell) else value


class Cell(str):
    """Text, and what it stands for."""

    @cached_property
    def parsed(self) -> Any:
        """The JSON value that the text is, or the text itself."""
        try:
            return json.loads(self)
        except (ValueError, RecursionError):
            return self
