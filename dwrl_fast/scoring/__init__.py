"""How responses are scored under a trained model: a file for each way that a model gives its verdict."""

from dwrl_fast.scoring.comparison import ChoiceScorer, ContestScorer, LabelScorer, read_choices
from dwrl_fast.scoring.generative import GenerativeScorer, read_scores
from dwrl_fast.scoring.point import PointScorer, read_points
from dwrl_fast.scoring.policy import PolicyScorer
from dwrl_fast.scoring.prefilled import PrefilledThoughts
from dwrl_fast.scoring.scalar import ScalarScorer
from dwrl_fast.scoring.scorer import Kind, Progress, Runtime, Scorer, fill_logprobs, fill_scores, marginal_scores

__all__ = [
    "ChoiceScorer",
    "ContestScorer",
    "GenerativeScorer",
    "Kind",
    "LabelScorer",
    "PointScorer",
    "PolicyScorer",
    "PrefilledThoughts",
    "Progress",
    "Runtime",
    "ScalarScorer",
    "Scorer",
    "fill_logprobs",
    "fill_scores",
    "marginal_scores",
    "read_choices",
    "read_points",
    "read_scores",
]
