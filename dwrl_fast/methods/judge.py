"""`judge`: no training. The model judges zero-shot (LLM-as-a-judge).

A model with its own judging prompt needs its own template (--template). Its verdict can be read if it ends with
`<answer>[[A]]</answer>` or B, like that of RM-R1.
"""

from typing import Any, NoReturn

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.methods.method_options import WritingOptions
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.methods.pairwise import PairwiseVerdicts


class Judge(PairwiseVerdicts):
    """An untrained model that judges two responses."""

    name = "judge"
    summary = "nothing is trained; the model is evaluated without training, and saved for dwrl_fast.evaluate"
    options = (WritingOptions,)
    trains = False

    @property
    def phases(self) -> tuple[str, ...]:
        return ()

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> NoReturn:
        raise NotImplementedError("a judge is not trained")
