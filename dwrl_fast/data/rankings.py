"""RANKING: a row with a prompt and K ranked responses.

The columns are `context` and `completions: [{rank, completion}]`, where rank 0 is best; or `prompt`, `responses` and
`ranks` (1 is best), `scores` (the highest is best) or both. With both, the ranks give the order and the scores the
margins.
"""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dwrl_fast.data.columns import REQUIRED, Columns, Turns, Unusable, conversation
from dwrl_fast.data.preference import Preference, Rankings, Ties

MOST_TIED = 7  # a Plackett-Luce group averages over all orders of its ties: 5,040 for seven responses
NO_ORDER = (
    "the ranks are not an order (they start at the best response, and tied responses share a rank: 1 2 2 3 or 1 2 2 4)"
)
NOT_BEST_OF_ROW = "responses left out: not the best of their row, or its repetition"
NO_WINNER = "all responses tie (--ties keep would use them)"


Groups = tuple[list[Preference], Mapping[str, int]]
"""The outcome of one row, or of the rows of one prompt: preferences, and notes as in Dataset."""


class Ranked(NamedTuple):
    """One of several responses. rank: 1 is best, equal for ties. name: its name in the source of a pair."""

    text: str
    rank: int
    score: float
    name: int


def ranking(row: Columns, ties: Ties, rankings: Rankings, *, best_only: bool = False) -> Groups:
    """The groups of one row; best_only: one group for the best response and for each that ties with it. Raises
    DataError or Unusable.
    """
    if row.names("completions") and not row.has("responses"):
        prompt, sides, ranks, scores = _completions(row)
    else:
        prompt, sides, ranks, scores = _responses(row)
    if len(sides) < 2:
        raise Unusable("fewer than two responses")
    turns, texts = conversation(prompt, sides)
    order = _order(ranks, scores, len(sides))
    margins = [-float(rank) for rank in order] if scores is None else scores
    found = [Ranked(*values) for values in zip(texts, order, margins, itertools.count(1), strict=False)]
    found.sort(key=lambda response: response.rank)
    like = row.preference(turns, ())
    # One winner among responses without scores: that does not mean that the losers are equally good.
    best_of_n = scores is None and len(found) > 2 and found[0].rank < found[1].rank == found[-1].rank
    too_many = len(found) > MOST_TIED and len(set(order)) < len(order)
    if not best_only and rankings == "plackett_luce" and len(found) > 2 and not best_of_n and not too_many:
        return [_group(found, like, ties)], {}
    two = zip(itertools.repeat(found[0]), found[1:]) if best_of_n else itertools.combinations(found, 2)
    like = replace(like, row=row.source)
    pairs, notes = compare_ranked(two, like, ties)
    if not pairs:
        raise Unusable(_no_pair(found))
    if best_only:
        groups = [replace(like, responses=(response.text,)) for response in best_of(found)]
        return groups, +Counter({NOT_BEST_OF_ROW: len(found) - len(groups)})
    if best_of_n:
        notes["pairs left out: losers of a best-of-n row"] = math.comb(len(found) - 1, 2)
    elif rankings == "plackett_luce" and too_many:
        notes[f"tied rankings of more than {MOST_TIED} responses taken as pairs"] = 1
    return pairs, notes


def compare_ranked(
    two: Iterable[tuple[Ranked, Ranked]], like: Preference, ties: Ties
) -> tuple[list[Preference], Counter[str]]:
    """Pairs, the better response first, with the prompt, aspect and row of `like`; their sources begin with that of
    `like`.

    Also returns notes on the pairs that are left out.
    """
    pairs, notes = [], Counter[str]()
    for better, worse in two:
        tie = better.rank == worse.rank
        margin = 0.0 if tie else better.score - worse.score
        if tie and ties == "drop":
            notes["pairs left out: tied"] += 1
        elif better.text.strip() == worse.text.strip():
            notes["pairs left out: identical responses"] += 1
        elif not math.isfinite(margin):
            notes["pairs left out: margin is not a finite number"] += 1
        else:
            texts, source = (better.text, worse.text), f"{like.source}:{better.name}-{worse.name}"
            pairs.append(replace(like, responses=texts, margin=margin, ranks=(1, 1) if tie else (), source=source))
    return pairs, notes


def best_of(found: Sequence[Ranked]) -> list[Ranked]:
    """The best responses of `found`, best first, each text once."""
    best = [response for response in found if response.rank == found[0].rank]
    return list({response.text.strip(): response for response in reversed(best)}.values())[::-1]


def ranks_of(scores: Sequence[float]) -> list[int]:
    """The rank of each score: 1 plus the number of higher scores."""
    ascending = sorted(scores)
    return [1 + len(scores) - bisect.bisect_right(ascending, score) for score in scores]


def _no_pair(found: Sequence[Ranked]) -> str:
    if found[0].rank == found[-1].rank:
        return NO_WINNER
    return (
        "identical responses" if len({one.text.strip() for one in found}) == 1 else "no two responses can be compared"
    )


def _group(found: Sequence[Ranked], like: Preference, ties: Ties) -> Preference:
    texts, ranks, *_ = zip(*found, strict=True)
    if len({text.strip() for text in texts}) < len(texts):
        raise Unusable("identical responses")
    if ranks[0] == ranks[-1] and ties == "drop":
        raise Unusable(NO_WINNER)
    return replace(like, responses=texts, ranks=ranks if len(set(ranks)) < len(ranks) else ())


Parts = tuple[Turns, list[Turns], list[int] | None, list[float] | None]


def _completions(row: Columns) -> Parts:
    """Prompt, responses and ranks from 1, without scores."""
    sides, ranks = [], []
    for item in row.sequence("completions"):
        if not isinstance(item, dict) or not {"rank", "completion"} <= item.keys():
            raise row.mistyped("completions", item, "objects with 'rank' and 'completion'")
        sides.append(_side(row, "completions", item["completion"]))
        ranks.append(_rank(row, "completions", item["rank"]) + 1)
    return row.prompt([item["completion"] for item in row.sequence("completions")], "context"), sides, ranks, None


def _responses(row: Columns) -> Parts:
    """Prompt, responses, and ranks or scores or both."""
    values = row.sequence("responses")
    ranks = scores = None
    if row.has("ranks"):
        ranks = [_rank(row, "ranks", value) for value in row.sequence("ranks")]
    if row.has("scores"):
        scores = [row.as_number("scores", value) for value in row.sequence("scores")]
    if ranks is None and scores is None:
        row.column("ranks", default=None if row.names("scores") else REQUIRED)  # raises the error that it is missing
        raise Unusable("null ranks and scores")
    return row.prompt(values), [_side(row, "responses", value) for value in values], ranks, scores


def _side(row: Columns, name: str, value: Any) -> Turns:
    if value is None:
        raise Unusable("null response")
    return row.as_turns(name, value, "assistant")


def _rank(row: Columns, name: str, value: Any) -> int:
    rank = row.as_number(name, value)
    if not rank.is_integer():
        raise Unusable(NO_ORDER)
    return int(rank)


def _order(ranks: list[int] | None, scores: list[float] | None, count: int) -> list[int]:
    """The ranks from 1, computed from the scores if there are no ranks. Raises Unusable if ranks or scores do not give
    one order.
    """
    if any(len(values) != count for values in (ranks, scores) if values is not None):
        raise Unusable("not one rank or score per response")
    if ranks is None:
        return ranks_of(scores or [])
    distinct = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
    dense, competition = [distinct[rank] for rank in ranks], ranks_of([-rank for rank in ranks])
    if ranks not in (dense, competition):
        raise Unusable(NO_ORDER)
    if scores is not None:
        for (a, x), (b, y) in itertools.combinations(zip(ranks, scores, strict=True), 2):
            if (a < b and x < y) or (a > b and x > y):
                raise Unusable("ranks and scores disagree")
    return ranks
