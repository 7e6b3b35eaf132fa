"""What every method is to the other rooms."""

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
"""Whose log-probs a ratio is taken to: what sampled the thoughts (or the same model, as the trainer computes it); the
model as it is before the step's updates; the model that the run started from.
"""


class Method(ABC):
    """One way to train a preference model. It holds no model: what a step needs of one is handed to it.

    Traits, by which the other rooms know a method:

    name, summary: in `--method` and in its help. preparation: what a rollout does, for the progress bar.
    options: the classes of options that have an effect under it. card_options: those that the model's card holds.
    template: the kind of template that it judges by; other_templates: those that it takes too where one is given.
    scalar: the model has a scalar head in place of a language model's.
    verdict: how the model gives its verdict, a name of `scoring.VERDICTS`.
    thinks: a thought precedes the verdict. contrasts: one thought alone about a context would teach nothing.
    trains: False where the model is only evaluated and saved. demonstrations: it takes rows with thought and verdict.
    old_policy: whose log-probs its ratio is taken to; None without a ratio.
    selects: only some of what is sampled is trained.
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
    demonstrations: ClassVar[bool] = False
    old_policy: ClassVar[OldPolicy | None] = None
    selects: ClassVar[bool] = False

    config: Any  # a TrainConfig
    dialog: Any  # a Dialog or SingleTurn, as `template` says
    question: Any  # the Dialog or SingleTurn in which thoughts are asked for

    def __init__(self, config: Any, dialog: Dialog | SingleTurn):
        self.config, self.dialog, self.question = config, dialog, dialog

    @classmethod
    def validate(cls, config: Any) -> None:
        """Raise ConfigError if options contradict each other under this method."""
        return

    @classmethod
    def takes(cls, config: Any) -> frozenset[str]:
        """Options that have an effect here, by name, beside those of `options`."""
        return frozenset()

    @classmethod
    def embedded_recipe(cls, given: dict[str, Any]) -> str:
        """The file of its options on the embedded task, under what the user gave."""
        return cls.name

    # What is asked

    @property
    def thoughts_each(self) -> int:
        """Thoughts that a step samples for each context; 0 where it samples none."""
        return 0

    @property
    def sampling_temperature(self) -> float:
        """That they are sampled at; 0 is greedy."""
        return self.config.temperature

    @property
    def writer(self) -> str | None:
        """Another model, a folder or a hub name, that writes them. None: the one that is trained."""
        return None

    def requests(self, rows: Sequence[Preference], seed: int) -> list[Request]:
        """What thoughts are sampled for, in the dialog `question`; rows in which nothing can be judged are left out."""
        return response_requests(rows, self.question)

    def groups(self, rows: Sequence[Preference], seed: int) -> list[Group]:
        """What is trained on, of a method that samples no thoughts."""
        raise NotImplementedError(f"{self.name} samples its thoughts")

    # How it is rewarded

    def reward(self, requests: Sequence[Request], groups: list[Group]) -> tuple[list[Group], int]:
        """The sampled groups with a reward for each thought, where the method gives one; and how many of the verdicts
        could not be read.
        """
        return groups, 0

    def keep(self, groups: list[Group], seed: int) -> list[Group]:
        """The groups that are trained on, of those that were sampled and rewarded."""
        return groups

    def figures(
        self, rows: Sequence[Preference], requests: Sequence[Request], sampled: list[Group], kept: list[Group],
        unread: int,
    ) -> dict[str, float]:  # fmt: skip
        """What is worth logging of a rollout. unread: verdicts that could not be read."""
        return {}

    # What is trained

    @property
    @abstractmethod
    def phases(self) -> tuple[str, ...]:
        """The updates that one minibatch gets, in order; each has its own learning rate."""

    @property
    def phase_by_phase(self) -> bool:
        """Whether a phase goes through the whole rollout batch before the next begins."""
        return False

    @property
    def separate_states(self) -> bool:
        """Whether each phase has an optimizer state of its own."""
        return False

    @property
    def trained_temperature(self) -> float:
        """The temperature of the log-probs that a ratio is made of."""
        return 1.0

    def learning_rate(self, phase: str) -> float:
        """The peak learning rate of a phase."""
        return self.config.learning_rate

    @abstractmethod
    def loss(self, phase: str, model: Any, batch: Batch, minibatch: Size, metrics: StepMetrics) -> Tensor:
        """The phase's loss over one micro-batch, a scalar divided by what the whole `minibatch` holds, so that it does
        not depend on micro-batches. model: a `GenerativeModel` or `ScalarModel`, as `scalar` says.
        """

    def card(self) -> dict[str, Any]:
        """What the JSON beside the saved model must hold so that it can be scored later."""
        return {"method": self.name} | {name: getattr(self.config, name) for name in self.card_options}
