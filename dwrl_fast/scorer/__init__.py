"""How responses are scored under a trained model: a file for each way that a model gives its verdict."""

from dwrl_fast.scorer.comparison import (
    ChoiceScorer,
    ContestScorer,
    LabelScorer,
    comparison_contexts,
    label_groups,
    read_choices,
)
from dwrl_fast.scorer.generative import GenerativeScorer, read_scores
from dwrl_fast.scorer.point import PointScorer, point_contexts, read_points
from dwrl_fast.scorer.policy import PolicyScorer
from dwrl_fast.scorer.prefilled import PrefilledThoughts
from dwrl_fast.scorer.scalar import ScalarScorer
from dwrl_fast.scorer.scorer import Kind, Progress, Runtime, Scorer, fill_scores, inference, marginal_scores

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
    "comparison_contexts",
    "fill_scores",
    "inference",
    "label_groups",
    "marginal_scores",
    "point_contexts",
    "read_choices",
    "read_points",
    "read_scores",
]
