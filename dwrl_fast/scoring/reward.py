"""Rewards for rows of other trainers. Every row that can be judged gets a reward; the others get None."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from dwrl_fast.data import Preference
from dwrl_fast.data.given import Turns, as_list, as_prompt, as_response, unusable
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import fit
from dwrl_fast.errors import DataError
from dwrl_fast.log import logger

INFINITE = "infinite log-odds, which cannot be a reward: use as_reward_function(probability=True)"


class Judgeable(NamedTuple):
    """A row that can be judged. reference: the text to compare the response with, if any."""

    place: int
    prompt: Turns
    response: str
    reference: str | None


@dataclass(frozen=True, slots=True)
class Rewards:
    """score: takes prompts, responses and `reference`, returns [N]. longest: maximum tokens of a sequence before its
    thought. unjudged: counts the rows without a reward, by reason; the first one is logged.
    """

    score: Callable[..., Tensor]
    dialog: Dialog | SingleTurn
    longest: int
    unjudged: Counter[str]

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], references: Sequence[Any] | None
    ) -> list[float | None]:
        """One reward per row; None if it cannot be judged. Raises DataError if the arguments are not lists of the same
        length, or if a reference is not text.
        """
        if not len(completions):
            return []
        for name, values in (("prompts", prompts), ("completions", completions), ("references", references)):
            if values is not None and len(as_list(name, values)) != len(completions):
                raise DataError(
                    f"{len(values)} {name} for {len(completions)} completions: give each completion its own"
                )
        found = (self._read(i, prompts[i], completions[i], references) for i in range(len(completions)))
        rows = [row for row in found if row is not None]
        rewards: list[float | None] = [None] * len(completions)
        if rows:
            compared = None if references is None else [row.reference for row in rows]
            scores = self.score([row.prompt for row in rows], [row.response for row in rows], reference=compared)
            for row, value in zip(rows, scores.tolist(), strict=True):
                if math.isfinite(value):
                    rewards[row.place] = value
                else:
                    self._pass_over(row.place, "a verdict that cannot be read" if math.isnan(value) else INFINITE)
        return rewards

    def _read(self, i: int, prompt: Any, completion: Any, references: Sequence[Any] | None) -> Judgeable | None:
        reference = None if references is None else references[i]
        if not isinstance(reference, str | list | tuple | None):
            raise DataError(
                f"the reference of completion {i} is not text but the {type(reference).__name__} {reference!r:.60}"
            )
        try:
            turns, begun = as_prompt("its prompt", prompt)
            texts = [begun + as_response("it", completion)]
            if references is not None:
                texts.append(begun + as_response("its reference", reference))
        except DataError as error:
            self._pass_over(i, unusable(error), str(error))
            return None
        tokens, reason = fit(Preference(turns, tuple(texts)), self.dialog, sys.maxsize)
        if reason or tokens > self.longest:
            self._pass_over(i, reason or "with its thought it has more tokens than the model has positions")
            return None
        return Judgeable(i, turns, texts[0], None if references is None else texts[1])

    def _pass_over(self, i: int, reason: str, said: str = "") -> None:
        if not self.unjudged:
            logger.warning(
                "completion %d of a batch gets no reward (None): %s. The same holds for every completion that cannot "
                "be judged; Scorer.unjudged counts them by reason",
                *(i, said or reason),
            )
        self.unjudged[reason] += 1
