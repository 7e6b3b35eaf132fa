"""`star-sft`: imitates the thoughts that end with the right verdict (docs/methods.md)."""

from typing import Any

from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.methods.star import SelfTaught


class StarImitation(SelfTaught):
    """Imitation of the thoughts whose verdict is right."""

    name = "star-sft"
    summary = "thoughts with the right verdict are imitated"

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """-log pi(o_t | .), the mean over the tokens of the minibatch."""
        head = model(batch, tokens=True)
        losses = -head.logprobs(head.token, batch.targets)
        metrics.add("loss", losses)
        return losses.sum() / minibatch.tokens
