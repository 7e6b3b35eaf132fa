"""`star-rationalizer`: imitates thoughts that were written with a known verdict, as answers to the question without the
verdict (docs/methods.md). Another model may write them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.dialog import SingleTurn, Template, load_template
from dwrl_fast.encode import Group, Request, Thought, comparison_requests, drawn_orders
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods.method_options import method_option
from dwrl_fast.methods.star_sft import StarImitation
from dwrl_fast.models.pretrained import load_tokenizer
from dwrl_fast.options import Options


@dataclass(frozen=True, kw_only=True)
class RationalizerOptions(Options):
    """The model and the template that produce the rationales."""

    rationalizer_model: str | None = method_option(
        None, "Folder or hub name of another model that writes the thoughts to imitate. none: the model itself."
    )
    rationalizer_template: str = method_option(
        "rationalizer",
        "Template of kind rationalizer, by name or as a YAML file. It must ask for the verdict in the form that "
        "--template uses.",
    )


class StarRationalizer(StarImitation):
    """Imitation of thoughts that were written with a known verdict."""

    name = "star-rationalizer"
    summary = "thoughts written with the verdict given are imitated"
    options = (*StarImitation.options, RationalizerOptions)
    preparation = "write rationales"

    def __init__(self, config: Any, dialog: SingleTurn):
        super().__init__(config, dialog)
        template = load_rationalizer(config.rationalizer_template)
        if self.writer is None:
            self.question = SingleTurn(dialog.tokenizer, template, dialog.named_aspect, dialog.enable_thinking)
        else:
            self.question = SingleTurn(load_tokenizer(self.writer), template, dialog.named_aspect)

    @property
    def writer(self) -> str | None:
        return self.config.rationalizer_model

    def requests(self, rows: Sequence[Preference], seed: int) -> list[Request]:
        """Requests with questions that contain the verdict."""
        drawn = drawn_orders(rows, step_seed(seed, "order", 0))
        return comparison_requests(rows, drawn, self.question, tell_verdict=True)

    def reward(self, requests: Sequence[Request], groups: list[Group]) -> tuple[list[Group], int]:
        """Reads the verdicts; then moves the thoughts behind the questions without the verdict."""
        rewarded, unread = super().reward(requests, groups)
        asked = zip(requests, rewarded, strict=True)
        return [self._ask_anew(request, group) for request, group in asked], unread

    def _ask_anew(self, request: Request, group: Group) -> Group:
        (own,) = comparison_requests([request.preference], [request.comparisons], self.dialog)
        thoughts = [[self._own(thought) for thought in some] for some in group.thoughts]
        sequences = [
            [self.dialog.sequence(context, thought.ids) for thought in some]
            for context, some in zip(own.contexts, thoughts, strict=True)
        ]
        return dataclasses.replace(group, sequences=sequences, thoughts=thoughts)

    def _own(self, thought: Thought) -> Thought:
        """The thought in ids of the trained model: the text of another model is encoded again. Its log-probs are
        dropped, because they belong to a different question.
        """
        ids = thought.ids
        if self.writer is not None:
            own = self.dialog.thought_ids(self.question.tokenizer.decode(ids[: len(ids) - thought.ended]))
            ids = own if thought.ended else own[:-1]
        return dataclasses.replace(thought, ids=ids, logprobs=[])


def load_rationalizer(name: str) -> Template:
    """The template that --rationalizer_template names. Raises ConfigError if it has a different kind."""
    template = load_template(name)
    if template.kind != "rationalizer":
        raise ConfigError(
            f"rationalizer_template = {name}: its kind is {template.kind}; give one of kind rationalizer, which shows "
            "the {verdict}"
        )
    return template
