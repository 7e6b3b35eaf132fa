"""Texts of files in Markdown: they are shown, and mark nothing up."""

import re
from collections.abc import Sequence
from typing import Any

from dwrl_fast.log import escaped


def plain(value: Any) -> str:
    """One line that Markdown takes as text: names of files and subsets are the user's."""
    text = escaped(" ".join(str(value).split()))
    return "".join(f"\\{c}" if c in r"\|`*_<>[]#" else c for c in text)


def table_row(cells: Sequence[Any]) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(plain, cells)) + " |"


def block(text: str, language: str = "text") -> str:
    """A block of code, in which nothing is markup; its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{escaped(text)}\n{fence}\n"


def inline(text: str) -> str:
    """Code within a line."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {escaped(text)} {fence}" if "`" in text else f"`{escaped(text)}`"
