"""One file's rows in a seeded order without end, epoch after epoch: what every way to hold them offers."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

from dwrl_fast.data import Preference


class Source(Protocol):
    """Usable rows of one file or data set, each epoch in another order."""

    name: str  # as the user gave it; Preference.source begins with it
    drawn: int  # rows given so far, over all epochs

    @property
    def rows(self) -> int | None:
        """How many groups an epoch has; None while that is not known."""

    @property
    def summary(self) -> str:
        """How far it is; of a stream also what became of the rows, those left out with their reasons."""

    def draw(self) -> Preference:
        """The next row. Raises DataError if there is none to use, or the file cannot be read on or was changed."""

    def identity(self) -> Any:
        """What makes the rows these rows, whatever the file is called. JSON."""

    def state(self) -> dict[str, Any]:
        """How far it is, as JSON; given to `restore` of a source like this one, that one goes on to the bit. DataError
        where its file is no longer the one that it began with, for then none could.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave. Raises CheckpointError if the rows are others now."""


def content_hash(rows: Iterable[Preference]) -> str:
    """Of all that is trained on, not of where it stood."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row.content).encode() + b"\n")
    return digest.hexdigest()


def with_aspect(row: Preference, aspect: str | None) -> Preference:
    """The row, `aspect` being its own where it has none."""
    return replace(row, aspect=aspect) if row.aspect is None and aspect is not None else row
