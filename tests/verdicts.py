"""Rows as a model might have judged them, and their preferences."""

from typing import Any

from dwrl_fast.data import Preference
from dwrl_fast.evaluation.judged import Judged


def preference(k: int = 2, place: int = 1, **changes: Any) -> Preference:
    responses = tuple("x" * (size + 1) for size in range(k))
    given: dict[str, Any] = {"prompt": ({"role": "user", "content": "?"},), "responses": responses}
    return Preference(**(given | {"source": f"rows:{place}"} | changes))


def judged_row(scores: list[float], ranks: tuple[int, ...] = (), **changes: Any) -> Judged:
    """By default each response has one verdict, its score."""
    given: dict[str, Any] = {
        "source": "rows:1",
        "subset": None,
        "id": None,
        "ranks": ranks or tuple(range(1, len(scores) + 1)),
        "scores": scores,
        "verdicts": [[score] for score in scores],
        "comparisons": [],
        "thoughts": [],
        "ended": [],
        "unparsable": 0,
        "first_shares": [],
        "token_scores": [],
    }
    return Judged(**(given | changes))
