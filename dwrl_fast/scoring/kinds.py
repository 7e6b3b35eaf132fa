"""The kinds of verdicts, by their names in `Method.verdict`."""

from typing import Any

from dwrl_fast.methods import METHODS
from dwrl_fast.scoring.comparison import ChoiceJudging, LabelJudging, LeadJudging
from dwrl_fast.scoring.judging import Judging
from dwrl_fast.scoring.log_likelihood import PolicyJudging
from dwrl_fast.scoring.point import PointJudging
from dwrl_fast.scoring.runtime import Runtime
from dwrl_fast.scoring.scalar import ScalarJudging
from dwrl_fast.scoring.yes_no import GenerativeJudging

VERDICTS: dict[str, type[Judging]] = {
    "label after a thought": GenerativeJudging,
    "number after a thought": PointJudging,
    "choice after a thought": ChoiceJudging,
    "label": LabelJudging,
    "lead": LeadJudging,
    "reward": ScalarJudging,
    "likelihood": PolicyJudging,
}


def judging_of(runtime: Runtime, card: dict[str, Any]) -> Judging:
    """The judging of the model of `runtime`, for the method that its card names."""
    return VERDICTS[METHODS[card["method"]].verdict](runtime, card)
