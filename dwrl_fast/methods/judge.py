"""`judge`: nothing is trained. The model judges zero-shot, as it is: LLM-as-a-judge.

A model that judges in a form of its own is asked by a template of its own (--template); its verdict is read all the
same where it ends with `<answer>[[A]]</answer>` or B, as RM-R1's does.
"""

from collections.abc import Sequence
from typing import NoReturn

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.methods.method import Tally
from dwrl_fast.methods.verdicts import PairwiseVerdicts
from dwrl_fast.scoring import Progress


class Judge(PairwiseVerdicts):
    name = "judge"
    trains = False

    @property
    def phases(self) -> tuple[str, ...]:
        return ()

    def rollout(self, rows: Sequence[Preference], seed: int, progress: Progress) -> NoReturn:
        raise NotImplementedError("a judge is not trained")

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> NoReturn:
        raise NotImplementedError("a judge is not trained")
