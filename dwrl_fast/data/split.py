"""The account of the rows of a split that is prepared."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Split:
    """The account of a split's published rows, counted from 1: read = used + dropped. One published row may give
    several rows.

    prompts: the converted rows as JSON lines, by the digest of their prompt. Their number is written + withheld (the
    prompt is in the test file) + not_drawn.
    """

    read: int = 0
    used: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    prompts: dict[int, list[str]] = field(default_factory=dict)
    written: int = 0
    withheld: int = 0
    not_drawn: int = 0

    def drop(self, reason: str, *rows: int) -> None:
        """Count published rows as dropped."""
        self.dropped.setdefault(reason, []).extend(rows)

    def draw(
        self, prompts: Mapping[int, list[str]], rows: int | None, randomness: random.Random
    ) -> dict[int, list[str]]:
        """Draw whole prompts at random, up to `rows` rows (None: all)."""
        order = list(prompts)
        randomness.shuffle(order)
        drawn: dict[int, list[str]] = {}
        for prompt in order:
            if rows is None or self.written + len(prompts[prompt]) <= rows:
                drawn[prompt] = prompts[prompt]
                self.written += len(prompts[prompt])
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """As JSON: everything except the prompts."""
        return {name: value for name, value in vars(self).items() if name != "prompts"}
