"""SINGLE: rows with `prompt`, `completion` and `score`, one response each. Rows with the same prompt are compared."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from dwrl_fast.data.columns import Columns, conversation
from dwrl_fast.data.preference import Message, Preference, Ties
from dwrl_fast.data.rankings import Groups, Ranked, best_of, compare_ranked, ranks_of

Key = tuple[tuple[tuple[str, str], ...], str | None]  # roles and contents of the prompt, and the aspect


NOT_BEST_OF_PROMPT = "not the best response of its prompt, or its repetition"


class Single(NamedTuple):
    """One row."""

    key: Key
    completion: str
    score: float
    line: int
    subset: str | None

    def preference(self, source: str) -> Preference:
        """The row alone, as a group of one response."""
        turns, aspect = self.key
        prompt = tuple(Message(role=role, content=content) for role, content in turns)
        return Preference(prompt, (self.completion,), aspect=aspect, source=source, subset=self.subset)


def single(row: Columns, line: int) -> Single:
    """The row, ready to be compared with others. Raises DataError or Unusable."""
    value = row.column("completion")
    turns, (completion,) = conversation(row.prompt([value]), [row.as_turns("completion", value, "assistant")])
    key = tuple((turn["role"], turn["content"]) for turn in turns)
    return Single((key, row.aspect()), completion, row.number("score"), line, row.label("subset"))


def compare_singles(
    rows: Sequence[Single], name: str, ties: Ties, *, best_only: bool = False
) -> tuple[Groups, list[tuple[str, int]]]:
    """The pairs from the rows of one prompt, with score differences as margins; and the rows that are in no pair, with
    the reason. best_only: instead of the pairs, one group for each row with a best response.
    """
    ranks = ranks_of([row.score for row in rows])
    found = [Ranked(row.completion, rank, row.score, row.line) for row, rank in zip(rows, ranks, strict=True)]
    found.sort(key=lambda response: response.rank)
    like = replace(rows[0].preference(name), row=f"{name}:{rows[0].line}")
    pairs, notes = compare_ranked(itertools.combinations(found, 2), like, ties)
    used = {line for pair in pairs for line in pair.lines}
    alone = {row.line: _alone(row, rows, ties) for row in rows if row.line not in used}
    if not best_only or not pairs:
        return (pairs, notes), [(reason, line) for line, reason in alone.items()]
    best = {response.name: response for response in best_of(found)}
    groups = [replace(row.preference(f"{name}:{row.line}"), row=like.row) for row in rows if row.line in best]
    return (groups, {}), [(alone.get(row.line, NOT_BEST_OF_PROMPT), row.line) for row in rows if row.line not in best]


def _alone(row: Single, rows: Sequence[Single], ties: Ties) -> str:
    """The reason why a row is in no pair."""
    if len(rows) == 1:
        return "the only completion of its prompt"
    tied = any(other.score == row.score and other.completion.strip() != row.completion.strip() for other in rows)
    return "no other score for its prompt" + (" (--ties keep would use it)" if tied and ties == "drop" else "")
