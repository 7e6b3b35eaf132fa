"""The judgement of one group: the content of scores.jsonl, from which all figures of a report are computed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dwrl_fast.evaluation.pairs import PairReport, full_report
from dwrl_fast.evaluation.units import Units
from dwrl_fast.scoring import ScoredGroup, marginal_scores
from dwrl_fast.scoring.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Judged:
    """One group of K responses, best first: a pair, or a ranking that is read as one group.

    scores: K, in nats, the log of the mean over the thoughts or comparisons of a response. verdicts: as in
    `ScoredGroup`, or the score of each thought. comparisons: C, the two responses that are shown, in this order.
    thoughts, ended: the texts of the thoughts, in the shape of `verdicts`, and whether each ended with a stop token.
    The other fields are as in `ScoredGroup`.
    """

    source: str
    subset: str | None
    id: str | None
    ranks: tuple[int, ...]
    scores: list[float]
    verdicts: list[list[float | None]]
    comparisons: list[tuple[int, int]]
    thoughts: list[list[str]]
    ended: list[list[bool]]
    unparsable: int
    first_shares: list[float]
    token_scores: list[float]

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        pairs = [(first, second) for first, second in saved["comparisons"]]
        return cls(**(saved | {"ranks": tuple(saved["ranks"]), "comparisons": pairs}))

    def to_dict(self) -> dict[str, Any]:
        """As JSON. Infinities stay; Python's JSON can read them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def judged(scorer: Scorer, groups: Sequence[ScoredGroup]) -> list[Judged]:
    """The judgements of `scorer` for `groups`."""
    scores = marginal_scores(groups).tolist()
    return [_judged(scorer, group, row) for group, row in zip(groups, scores, strict=True)]


def _judged(scorer: Scorer, found: ScoredGroup, scores: list[float]) -> Judged:
    group, decode = found.group, scorer.dialog.tokenizer.decode
    row = group.preference
    count = len(row.responses)
    return Judged(
        source=row.source,
        subset=row.subset,
        id=row.id,
        ranks=group.ranks,
        scores=scores[:count],
        verdicts=[list(some) for some in found.verdicts or found.scores],
        comparisons=[each.places for each in found.comparisons],
        thoughts=[[decode(one.ids[one.thought]) for one in each] for each in group.sequences] if group.thoughts else [],
        ended=[[thought.ended for thought in some] for some in group.thoughts],
        unparsable=found.unparsable,
        first_shares=found.first_shares,
        token_scores=found.token_scores,
    )


def score_table(rows: Sequence[Judged]) -> Tensor:
    """Scores in the form that `pair_report` takes: float64 [P, K], nan if a row has fewer responses."""
    return _table([row.scores for row in rows])


def judged_report(rows: Sequence[Judged], seed: int, units: Units) -> PairReport:
    """The report over all `rows`. Raises DataError like `pair_report`."""
    return full_report(
        score_table(rows),
        [row.ranks for row in rows],
        seed,
        units,
        unparsable=sum(row.unparsable for row in rows),
        first_shares=[share for row in rows for share in row.first_shares],
        token_scores=_table([row.token_scores for row in rows]) if rows[0].token_scores else None,
    )


def _table(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows), default=0)
    padded = [[*row, *[float("nan")] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)
