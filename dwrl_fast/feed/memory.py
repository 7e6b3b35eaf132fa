"""A source with all rows in memory, in a new permutation for each epoch, drawn from the seed."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.feed.source import content_hash


class Shuffled:
    """A Source. stream: distinguishes its order from others with the same seed."""

    streamed: ClassVar[bool] = False

    def __init__(self, name: str, rows: Sequence[Preference], seed: int, stream: str = "order"):
        self.name, self.content, self.seed, self.stream = name, rows, seed, stream
        self.drawn = 0
        self.epoch = functools.lru_cache(maxsize=1)(self._epoch)

    @property
    def rows(self) -> int:
        """The number of groups in an epoch."""
        return len(self.content)

    @property
    def summary(self) -> str:
        """Its progress, in words."""
        return f"{self.name}: {self.drawn:,} rows drawn, {self.drawn / self.rows:.2f} passes over {self.rows:,} groups"

    def draw(self) -> Preference:
        """The next row."""
        epoch, place = divmod(self.drawn, len(self.content))
        self.drawn += 1
        return self.content[self.epoch(epoch)[place]]

    def identity(self) -> str:
        """A hash of the rows, in the order of the file."""
        return content_hash(self.content)

    def state(self) -> dict[str, Any]:
        """The number of rows drawn so far."""
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.drawn = state["drawn"]

    def _epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(step_seed(self.seed, self.stream, epoch)).permutation(len(self.content))
