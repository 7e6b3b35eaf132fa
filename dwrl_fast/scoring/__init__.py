"""Scores responses with a trained model: one file for each kind of verdict, and the public `Scorer` over all kinds."""

from dwrl_fast.scoring.comparison import ChoiceJudging, LabelJudging, LeadJudging
from dwrl_fast.scoring.judging import Judging, Kind, Progress
from dwrl_fast.scoring.kinds import VERDICTS, judging_of
from dwrl_fast.scoring.log_likelihood import PolicyJudging
from dwrl_fast.scoring.point import PointJudging
from dwrl_fast.scoring.runtime import Runtime, load_runtime
from dwrl_fast.scoring.scalar import ScalarJudging
from dwrl_fast.scoring.scored import ScoredGroup, marginal_scores
from dwrl_fast.scoring.yes_no import GenerativeJudging

__all__ = [
    "VERDICTS",
    "ChoiceJudging",
    "GenerativeJudging",
    "Judging",
    "Kind",
    "LabelJudging",
    "LeadJudging",
    "PointJudging",
    "PolicyJudging",
    "Progress",
    "Runtime",
    "ScalarJudging",
    "ScoredGroup",
    "judging_of",
    "load_runtime",
    "marginal_scores",
]
