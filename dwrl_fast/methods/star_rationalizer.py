"""`star-rationalizer`: thoughts that were written with the verdict given are imitated as answers to the question that
does not tell it (docs/methods.md). Another model may write them.
"""

from collections.abc import Sequence

from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Context, SingleTurn
from dwrl_fast.encode import Group
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods.generative import GenerativeMethod
from dwrl_fast.methods.star import select
from dwrl_fast.methods.star_sft import StarImitation
from dwrl_fast.methods.verdicts import Asked
from dwrl_fast.models.pretrained import load_tokenizer
from dwrl_fast.sampling import Sampler
from dwrl_fast.scoring import Progress
from dwrl_fast.templates import Template, load_template


class StarRationalizer(StarImitation):
    name = "star-rationalizer"
    preparation = "write rationales"

    def __init__(self, config: TrainConfig, dialog: SingleTurn, compute: Compute):
        super().__init__(config, dialog, compute)
        template = load_rationalizer(config.rationalizer_template)
        if config.rationalizer_model is None:
            self.question = SingleTurn(dialog.tokenizer, template, dialog.aspect, dialog.enable_thinking)
            self.writer: Sampler = self.sampler
        else:
            self.question = SingleTurn(load_tokenizer(config.rationalizer_model), template, dialog.aspect)
            self.writer = self.load_writer(config, self.question)

    def load_writer(self, config: TrainConfig, question: SingleTurn) -> Sampler:
        runtime = GenerativeMethod.load(
            config.rationalizer_model, None, 0, question, self.compute, self.layout, config.generation_batch_size
        )
        assert runtime.sampler is not None
        runtime.model.requires_grad_(False)
        return runtime.sampler

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        asked = self.ask(rows, seed)
        written = self.written(asked, self.given(asked), self.question, self.writer, seed, progress)
        for group, contexts in zip(written, self.contexts(asked), strict=True):
            self.ask_anew(group, contexts)
        kept = [one for group in written for one in select(group, self.judged(group, right=True))]
        return kept, self.figures(rows, asked, written, kept)

    def given(self, asked: Asked) -> list[list[Context]]:
        """The questions that tell the verdict."""
        return [
            [
                self.question.context(
                    row.prompt, [row.responses[k] for k in each.places], row.aspect, "AB"[each.right or 0]
                )
                for each in some
            ]
            for row, some in asked
        ]

    def ask_anew(self, group: Group, contexts: Sequence[Context]) -> None:
        """Put the group's thoughts, as they were written, after the questions that do not tell."""
        group.sequences = [
            [
                self.dialog.sequence(context, self.own_ids(sequence.ids[sequence.thought], end))
                for sequence, end in zip(sequences, ended, strict=True)
            ]
            for context, sequences, ended in zip(contexts, group.sequences, group.ended, strict=True)
        ]
        group.old_logprobs = []  # those of another question

    def own_ids(self, ids: list[int], ended: bool) -> list[int]:
        """A thought in the ids of the model that is trained: another model's goes by its text."""
        if self.config.rationalizer_model is None:
            return ids
        own = self.dialog.thought_ids(self.question.tokenizer.decode(ids[: len(ids) - ended]))
        return own if ended else own[:-1]


def load_rationalizer(name: str) -> Template:
    """The template that --rationalizer_template names. ConfigError where it is of another kind."""
    template = load_template(name)
    if template.kind != "rationalizer":
        raise ConfigError(
            f"rationalizer_template = {name}: its kind is {template.kind}; give one of kind rationalizer, which shows "
            "the {verdict}"
        )
    return template
