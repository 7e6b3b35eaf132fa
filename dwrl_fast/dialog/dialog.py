"""The dialog of DWRL as token ids: [prompt, response, evaluate turn, thought, rate turn, head].

A thought is appended as its sampled ids, never decoded and encoded again. So the sequence that the sampler saw is a
prefix of the sequence that is scored.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dwrl_fast.data import Message
from dwrl_fast.dialog.chat import Chat, Thinking, assistant, roles_of, user
from dwrl_fast.dialog.sequence import Context, TokenSequence
from dwrl_fast.errors import TemplateError
from dwrl_fast.templates import Template, fill, load_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANONICAL: tuple[tuple[Message, ...], ...] = (
    (user("What is two plus three?"),),
    (user("Name a colour."), assistant("Blue."), user("And another one, please.")),
)
CANONICAL_RESPONSE = "It is five."
CANONICAL_THOUGHT = "The answer is right and short."


class Dialog(Chat):
    """Builds every sequence that is sampled from, trained on or scored, for one tokenizer, template and aspect.

    Raises TemplateError, which names the tokenizer, if its chat template does not fit (see Chat), if it gives different
    ids on plain turns, if it shows earlier turns differently when turns follow, or if a label is not one token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: Template | None = None,
        aspect: str | None = None,
        enable_thinking: Thinking = "auto",
    ) -> None:
        super().__init__(tokenizer, template or load_template(), aspect, enable_thinking)
        if self.template.kind != "dialog" or self.template.labels is None:
            raise TemplateError(
                f"a template of kind {self.template.kind} where a dialog is needed; give --template dialog, or a file "
                "of kind dialog"
            )
        self._tail = functools.lru_cache(maxsize=256)(self._build_tail)
        for prompt in CANONICAL:
            self._check_canonical(prompt)
        self.yes_id, self.no_id = self._label_ids(self.template.labels, self._canonical(CANONICAL[0], self.aspect))
        self.counts.clear()

    def context(self, prompt: Sequence[Message], response: str, aspect: str | None = None) -> Context:
        """The context for sampling a thought about `response`: [prompt, response, evaluate turn, generation head]."""
        self._check_roles(roles_of(prompt))
        evaluate = _fill(self.template.evaluate, self.aspect if aspect is None else aspect)
        ids, spans, _ = self._build([*prompt, assistant(response), user(evaluate)], "thought")
        return Context(ids, slice(0, spans[-2].start), spans[-2], spans[-1], aspect=aspect)

    def sequence(self, context: Context, thought_ids: Sequence[int]) -> TokenSequence:
        """`context`, the sampled thought, the rate turn and the generation head.

        If a thought does not end with the end-of-turn, it is appended outside the span `thought`, so it is not trained.
        """
        closing, rate, head = self._tail(self.aspect if context.aspect is None else context.aspect)
        if thought_ids and thought_ids[-1] == self.end_id:
            closing = closing[1:]
        thought = slice(len(context.ids), len(context.ids) + len(thought_ids))
        start = thought.stop + len(closing)
        ids = [*context.ids, *thought_ids, *closing, *rate, *head]
        return TokenSequence(ids, context.prompt, context.response, thought, slice(start, start + len(rate)))

    def plain(self, prompt: Sequence[Message], response: str) -> TokenSequence:
        """[prompt, response, end-of-turn], the input of a reward head. `thought` and `rate` are empty."""
        completion = self.completion(prompt, response)
        return replace(completion, thought=completion.rate)

    @property
    def label_ids(self) -> tuple[int, int]:
        """The ids of the two labels, the better one first."""
        return self.yes_id, self.no_id

    def special_ids(self) -> dict[str, int]:
        """What a saved model's tokenizer must agree on."""
        return {"yes_id": self.yes_id, "no_id": self.no_id, "end_id": self.end_id}

    def _check_roles(self, roles: tuple[str, ...]) -> None:
        """Check that the thought and the rate turn do not change [prompt, response, evaluate turn] or the head (except
        for a think block) that the sampler saw.
        """
        context = self._structure((*roles, "assistant", "user"), "thought")
        full = self._structure((*roles, "assistant", "user", "assistant", "user"), "label")
        usual = self._structure((*roles_of(CANONICAL[0]), "assistant", "user", "assistant", "user"), "label")
        as_sampled = (*full.texts[:-3], full.texts[-3] + self._head)
        if as_sampled != context.texts or full.texts[-2:] != usual.texts[-2:]:
            raise self.error(
                f"shows earlier turns differently once others follow (roles {', '.join(roles)}); use {self.alternative}"
            )

    def _canonical(self, prompt: tuple[Message, ...], aspect: str) -> list[Message]:
        evaluate, rate = (_fill(text, aspect) for text in (self.template.evaluate, self.template.rate))
        turns = [assistant(CANONICAL_RESPONSE), user(evaluate), assistant(CANONICAL_THOUGHT), user(rate)]
        return [*prompt, *turns]

    def _build_tail(self, aspect: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The ids after a thought, the same for all conversations: the end of its turn, the rate turn's text, the
        head.
        """
        messages = self._canonical(CANONICAL[0], aspect)
        structure = self._structure(roles_of(messages), "label")
        contents = [message["content"] for message in messages]
        rate = self._as_rendered(structure, contents, self._render(messages, "label"))[-1]
        return structure.ids[-2], self._contents(rate), structure.ids[-1]

    def _check_canonical(self, prompt: tuple[Message, ...]) -> None:
        """Check on plain turns that our ids equal the tokenizer's ids of the whole conversation, except for the think
        block that the sampler saw before the thought.
        """
        messages = self._canonical(prompt, self.aspect)
        context = self.context(prompt, CANONICAL_RESPONSE)
        self._check_equal(context.ids, self._tokenized(messages[:-2], "thought"))
        ours = self.sequence(context, self._contents(CANONICAL_THOUGHT)).ids
        head = self._structure(roles_of(messages[:-2]), "thought").ids[-1]
        header = self._structure(roles_of(messages), "label").ids[-3]
        before = len(context.ids) - len(head) + len(header)
        self._check_equal([*ours[:before], *ours[len(context.ids) :]], self._tokenized(messages, "label"))
        ours = self.plain(prompt, CANONICAL_RESPONSE).ids
        self._check_equal(ours, self._tokenized(messages[: len(prompt) + 1], None)[: len(ours)])


def _fill(text: str, aspect: str) -> str:
    return fill(text, {"aspect": aspect})[0]
