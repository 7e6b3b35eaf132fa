"""`judge`: nothing is trained. The model judges zero-shot, as it is: LLM-as-a-judge.

A model that judges in a form of its own is asked by a template of its own (--template); its verdict is read all the
same where it ends with `<answer>[[A]]</answer>` or B, as RM-R1's does.
"""

from typing import Any, NoReturn

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.methods.method_options import WritingOptions
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.methods.pairwise import PairwiseVerdicts


class Judge(PairwiseVerdicts):
    """A model that judges two responses as it is."""

    name = "judge"
    summary = "nothing is trained; the model is evaluated without training, and saved for dwrl_fast.evaluate"
    options = (WritingOptions,)
    trains = False

    @property
    def phases(self) -> tuple[str, ...]:
        return ()

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> NoReturn:
        raise NotImplementedError("a judge is not trained")
