"""The accuracy of a saved model on pairs, recomputed from its scores."""

import math
from pathlib import Path

from dwrl_fast import Scorer
from dwrl_fast.data import read_preferences


def share_won(model: Path, pairs: Path, votes: int = 1, seed: int = 0) -> float:
    """The share of `pairs`, better response first, in which the model scores the first higher; a tie is one half."""
    scorer = Scorer.from_pretrained(model, dtype="fp32")
    won = 0.0
    groups = scorer.score_groups(read_preferences(str(pairs)).rows, votes=votes, seed=seed)
    for group in groups:
        better, worse = (log_mean_exp(scores) for scores in group.scores)
        won += 0.5 if better == worse else float(better > worse)
    return won / len(groups)


def log_mean_exp(scores: list[float]) -> float:
    """The log of the mean of exp(scores), stable for scores far below 0."""
    top = max(scores)
    return top + math.log(sum(math.exp(score - top) for score in scores) / len(scores))
