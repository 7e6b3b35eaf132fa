"""How responses are scored under a trained model: a file for each way that a model gives its verdict, and the public
`Scorer` over all of them.
"""

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
