"""The interface of a source: the rows of one file in a seeded order, epoch after epoch, without end."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from dwrl_fast.data import Preference


class Source(Protocol):
    """The usable rows of one file or data set, in a different order in each epoch."""

    streamed: ClassVar[bool]  # whether it is read on demand
    name: str  # as given by the user; Preference.source begins with it
    drawn: int  # rows given so far, over all epochs

    @property
    def rows(self) -> int | None:
        """The number of groups in an epoch; None while it is unknown."""

    @property
    def summary(self) -> str:
        """Its progress, in words; for a stream also the account of its rows, including those left out and the
        reasons.
        """

    def draw(self) -> Preference:
        """The next row. Raises DataError if there is no usable row, or if the file cannot be read further or was
        changed.
        """

    def identity(self) -> Any:
        """The identity of the rows, independent of the file name, as JSON."""

    def state(self) -> dict[str, Any]:
        """Its position, as JSON. A source with the same arguments continues exactly from it after `restore`. Raises
        DataError if its file has changed, because then no source could continue.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises CheckpointError if the rows have changed."""


def content_hash(rows: Iterable[Preference]) -> str:
    """A hash of everything that training uses, without the sources of the rows."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row.content).encode() + b"\n")
    return digest.hexdigest()


def with_aspect(row: Preference, aspect: str | None) -> Preference:
    """The row with `aspect`, if it has no aspect of its own."""
    return replace(row, aspect=aspect) if row.aspect is None and aspect is not None else row
