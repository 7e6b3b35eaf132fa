"""`dpo`: a policy that prefers the better response, without a reward model (docs/methods.md).

The implicit reward beta (log pi(y | x) - log pi_ref(y | x)) replaces a reward, so every preference format has the same
likelihood as for `bt`. The frozen model pi_ref is the model at the start of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, completion_groups
from dwrl_fast.methods.bt import reward_loss
from dwrl_fast.methods.method import Method
from dwrl_fast.methods.method_options import method_option
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.objectives.direct_preference import implicit_reward
from dwrl_fast.options import POSITIVE, Options


@dataclass(frozen=True, kw_only=True)
class BetaOptions(Options):
    """The option of methods with an implicit reward."""

    beta: float | None = method_option(
        None,
        "Beta of DPO: how strongly the policy is tied to its reference, the model before training or, for star-dpo, "
        "the model at the start of the round. It is not the weight of a KL term. none: 0.22, the paper's; 0.1 for "
        "star-dpo.",
        bound=POSITIVE,
    )


class DirectPreference(Method):
    """The preference likelihood of implicit rewards, relative to the model at the start of the run."""

    name = "dpo"
    summary = "a policy: the best response is preferred to the others"
    options = (BetaOptions,)
    card_options = ("beta",)
    verdict = "likelihood"
    preparation = "encode, reference"
    limit = (
        "Its scores are implicit rewards, relative to a frozen reference: the model that its training started from. "
        "Where that is not found, they are beta log pi(y | x), and a warning says so. Scores of the two kinds cannot "
        "be compared."
    )
    old_policy = "start"
    default_beta: ClassVar[float] = 0.22

    @property
    def phases(self) -> tuple[str, ...]:
        return ("policy",)

    @property
    def beta(self) -> float:
        """The weight of the implicit reward."""
        return self.default_beta if self.config.beta is None else self.config.beta

    def groups(self, rows: Sequence[Preference], seed: int) -> list[Group]:
        return completion_groups(rows, self.dialog)

    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        assert batch.old_logprob is not None
        head = model(batch, tokens=True)
        logprob = head.logprobs(head.token, batch.targets)
        rewards = implicit_reward(logprob, batch.old_logprob, batch.lengths, self.beta)
        return reward_loss(batch, rewards, metrics) / minibatch.groups

    def card(self) -> dict[str, Any]:
        """Also contains the place of the frozen model: the options that name it, and the seed if its weights are
        drawn.
        """
        config = self.config
        names = {"model_name_or_path": config.model_name_or_path, "model_config": config.model_config}
        start = {k: str(Path(v).resolve()) if v and Path(v).exists() else v for k, v in names.items()}
        return super().card() | {"beta": self.beta, "reference": start | {"seed": config.seed}}
