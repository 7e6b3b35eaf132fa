"""The interface of a method."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group, Request, response_requests
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.options import Options

OldPolicy = Literal["sampler", "itself", "start"]
"""The old policy of the probability ratio: the sampler of the thoughts (or the same model as computed by the trainer);
the model before the updates of the step; the model at the start of the run.
"""


class Method(ABC):
    """One way to train a preference model. It holds no model: the model is an argument of its functions.

    Traits that other packages read:

    name, summary: for `--method` and its help. preparation: what a rollout does, for the progress bar.
    options: the classes of options that have an effect. card_options: options stored in the model's card.
    template: the kind of its template; other_templates: further kinds that the user may give.
    scalar: the model has a scalar head instead of a language-model head.
    verdict: how the model gives its verdict, a name in `scoring.VERDICTS`.
    thinks: a thought precedes the verdict. contrasts: a single thought per context teaches nothing.
    trains: False if the model is only evaluated and saved. imitates: trains on the best response of several alone, and
    on rows with thought and verdict.
    old_policy: the old policy of its probability ratio; None without a ratio.
    selects: only some of the sampled thoughts are trained.
    limit: what its scores depend on, a sentence for the README of a model; empty if nothing.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    preparation: ClassVar[str] = "encode"
    options: ClassVar[tuple[type[Options], ...]] = ()
    card_options: ClassVar[tuple[str, ...]] = ()
    template: ClassVar[str] = "dialog"
    other_templates: ClassVar[tuple[str, ...]] = ()
    scalar: ClassVar[bool] = False
    verdict: ClassVar[str]
    thinks: ClassVar[bool] = False
    contrasts: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    imitates: ClassVar[bool] = False
    old_policy: ClassVar[OldPolicy | None] = None
    selects: ClassVar[bool] = False
    limit: ClassVar[str] = ""

    config: Any  # a TrainConfig
    dialog: Any  # a Dialog or a SingleTurn, depending on `template`
    question: Any  # the Dialog or SingleTurn that asks for thoughts

    def __init__(self, config: Any, dialog: Dialog | SingleTurn):
        self.config, self.dialog, self.question = config, dialog, dialog

    @classmethod
    def validate(cls, config: Any) -> None:
        """Raise ConfigError if options contradict each other under this method."""
        return

    @classmethod
    def takes(cls, config: Any) -> frozenset[str]:
        """Names of further options that have an effect, in addition to those of `options`."""
        return frozenset()

    @classmethod
    def embedded_recipe(cls, given: dict[str, Any]) -> str:
        """The file with its options for the embedded task, given the options of the user."""
        return cls.name

    # What is asked

    @property
    def thoughts_each(self) -> int:
        """The number of thoughts that a step samples per context; 0 for none."""
        return 0

    @property
    def sampling_temperature(self) -> float:
        """The sampling temperature of thoughts; 0 is greedy."""
        return self.config.temperature

    @property
    def writer(self) -> str | None:
        """The model that writes the thoughts, as a folder or a hub name. None: the trained model."""
        return None

    def requests(self, rows: Sequence[Preference], seed: int) -> list[Request]:
        """The requests for thoughts, in the dialog `question`. Rows without anything to judge are left out."""
        return response_requests(rows, self.question)

    def groups(self, rows: Sequence[Preference], seed: int) -> list[Group]:
        """The groups to train on, for a method that samples no thoughts."""
        raise NotImplementedError(f"{self.name} samples its thoughts")

    # How it is rewarded

    def reward(self, requests: Sequence[Request], groups: list[Group]) -> tuple[list[Group], int]:
        """The sampled groups with a reward for each thought, if the method gives rewards; and the number of unreadable
        verdicts.
        """
        return groups, 0

    def keep(self, groups: list[Group], seed: int) -> list[Group]:
        """The subset of the sampled and rewarded groups that is trained."""
        return groups

    def figures(
        self, rows: Sequence[Preference], requests: Sequence[Request], sampled: list[Group], kept: list[Group],
        unread: int,
    ) -> dict[str, float]:  # fmt: skip
        """Figures of a rollout for the log. unread: the number of unreadable verdicts."""
        return {}

    # What is trained

    @property
    @abstractmethod
    def phases(self) -> tuple[str, ...]:
        """The updates on one minibatch, in order. Each has its own learning rate."""

    @property
    def phase_by_phase(self) -> bool:
        """Whether a phase runs over the whole rollout batch before the next phase begins."""
        return False

    @property
    def separate_states(self) -> bool:
        """Whether each phase has its own optimizer state."""
        return False

    @property
    def trained_temperature(self) -> float:
        """The temperature of the log-probs in the ratio."""
        return 1.0

    def learning_rate(self, phase: str) -> float:
        """The peak learning rate of a phase."""
        return self.config.learning_rate

    @abstractmethod
    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """The loss of a phase over one micro-batch: a scalar, divided by the size of the whole `minibatch`, so that it
        does not depend on micro-batches. model: a `GenerativeModel`, or a `ScalarModel` if `scalar`.
        """

    def card(self) -> dict[str, Any]:
        """The entries of the model's card that later scoring needs."""
        return {"method": self.name} | {name: getattr(self.config, name) for name in self.card_options}
