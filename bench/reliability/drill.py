"""The result of a drill."""

from typing import NamedTuple


class Drill(NamedTuple):
    """asked, found: the required result and the actual one, in words. held: whether the drill passed."""

    name: str
    asked: str
    found: str
    held: bool
