"""What a drill gives back."""

from typing import NamedTuple


class Drill(NamedTuple):
    """asked, found: what must be shown, and what was, in words. held: whether that is enough."""

    name: str
    asked: str
    found: str
    held: bool
