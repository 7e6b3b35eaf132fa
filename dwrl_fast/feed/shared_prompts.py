"""Warns about prompts that occur in both training and held-out rows: accuracy on them measures memory."""

from collections.abc import Iterable, Sequence
from typing import Any

from dwrl_fast.data import Preference
from dwrl_fast.feed.feed import Feed
from dwrl_fast.feed.memory import Shuffled
from dwrl_fast.log import logger


def warn_of_shared_prompts(feed: Feed, held_out: Sequence[Preference]) -> None:
    """Count the held-out rows whose prompt occurs in the training rows, as far as these are in memory, and log a
    warning.
    """
    if not held_out:
        return
    trained = set[Any]()
    for source in feed.sources:
        if isinstance(source, Shuffled):
            trained |= prompts(source.content)
        else:
            logger.info(
                "%s is streamed: it was not checked for held-out prompts (python -m dwrl_fast.data --check TRAIN "
                "TEST does this)",
                source.name,
            )
    if said := shared(trained, held_out):
        logger.warning(said)


def shared(trained: set[Any], held_out: Sequence[Preference]) -> str:
    """A sentence about the held-out rows whose prompt is in `trained`; empty if there are none."""
    again = [row for row in held_out if _key(row) in trained]
    if not again:
        return ""
    return (
        f"{len(again):,} of the {len(held_out):,} held-out groups ({again[0].source}, ...) have a prompt that occurs "
        "in the training rows: their accuracy says nothing about new prompts. Remove them from one of the two files "
        "(python -m dwrl_fast.data --check TRAIN TEST lists them)."
    )


def prompts(rows: Iterable[Preference]) -> set[Any]:
    """The prompts of rows, in the form in which they are compared."""
    return {_key(row) for row in rows}


def _key(row: Preference) -> int:
    return hash(tuple((turn["role"], turn["content"]) for turn in row.prompt))
