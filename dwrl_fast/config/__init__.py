"""The options of all commands. Names follow TRL if TRL has the option; the help text of an option says what it does."""

from dwrl_fast.config.common import CommonOptions, JudgingOptions
from dwrl_fast.config.evaluate import BEST_OF, VOTE_CURVE, EvaluateConfig, parse_evaluate
from dwrl_fast.config.train import NEWEST, TrainConfig, parse_train

__all__ = [
    "BEST_OF",
    "NEWEST",
    "VOTE_CURVE",
    "CommonOptions",
    "EvaluateConfig",
    "JudgingOptions",
    "TrainConfig",
    "parse_evaluate",
    "parse_train",
]
