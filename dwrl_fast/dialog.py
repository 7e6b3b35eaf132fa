"""A conversation as token ids with named spans: [prompt, response, evaluate turn, thought, rate turn, generation head].

The chat template gives the structure and never sees a content: it renders each sequence of roles once, with placeholders, and what
stands between them becomes fixed segments of ids. Contents are encoded by a tokenizer in which control tokens cannot arise, so a
response that spells a turn does not forge one. Ids are the truth: a sampled thought is appended as it was sampled.

Not covered: templates that open a think block in the generation head, or rewrite earlier turns; they are refused by name.
"""

import functools
from collections import Counter
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dwrl_fast.contents import ContentTokenizer
from dwrl_fast.data import Message
from dwrl_fast.errors import TemplateError
from dwrl_fast.log import info_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)  # for templates that print the date: a run must not depend on the day it is made
PLACEHOLDER = "[[content-{}]]"
CANONICAL: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "What is two plus three?"},),
    (
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And another one, please."},
    ),
)


@dataclass(frozen=True)
class Template:
    """The two turns that make a model judge, and its two labels. Both turns may hold "{aspect}"."""

    evaluate: str = (
        "Now review the assistant's last response with regard to {aspect}. Work through what it does well, where it goes wrong "
        "and what it leaves out, and say how much each point matters. Do not give a verdict yet."
    )
    rate: str = "On the strength of your review, is that response a good one with regard to {aspect}? Reply with Yes or No only."
    labels: tuple[str, str] = ("Yes", "No")


@dataclass(frozen=True, slots=True)
class Context:
    """What a thought is sampled from. `prompt` is all that precedes the response, `response` the ids of its text."""

    ids: list[int]
    prompt: slice
    response: slice
    aspect: str | None = None  # the rate turn's; None is the dialog's own


@dataclass(frozen=True, slots=True)
class Sequence:
    """What is scored, at the last id. `thought` spans the trained ids (with a sampled end-of-turn), `rate` the rate turn's text."""

    ids: list[int]
    prompt: slice
    response: slice
    thought: slice
    rate: slice


@dataclass(frozen=True, slots=True)
class _Structure:
    """What a template puts before, between and after the contents of one sequence of roles: n contents, n + 1 segments."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


class Dialog:
    """Builds every sequence that is sampled from, trained on or scored, for one tokenizer, template and aspect.

    `end_id` ends a turn, `stop_ids` end a thought, `pad_id` may be anything since padding is masked. `counts` says, over the contexts
    built so far, how many held a content that was "trimmed" by the chat template, that spells "control text" or that the template
    would have "rewritten" otherwise, and how many "merged": their ids differ from those of tokenizing the rendered conversation.
    All of them are kept.

    Raises TemplateError, naming the tokenizer, where its chat template does not fit: ids that differ from the template's own on plain
    turns, labels that are not one token, earlier turns rewritten, no end-of-turn token.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template | None = None, aspect: str = "helpfulness"
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template or Template()
        self.aspect = aspect
        self.name = f"{type(tokenizer).__name__} {tokenizer.name_or_path}".strip()
        self.counts: Counter[str] = Counter()
        self._check_tokenizer()
        self._contents = ContentTokenizer(tokenizer)
        self._structure = functools.cache(self._render_structure)
        self._tail = functools.lru_cache(maxsize=256)(self._build_tail)

        closing, *_ = self._tail(aspect)
        if not closing or closing[0] not in self._contents.control:
            raise self._error(
                "does not end an assistant turn with a control token; end-of-turn could not be told from text"
            )
        self.end_id: int = closing[0]
        eos = tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = (self.end_id,) if eos in (None, self.end_id) else (self.end_id, int(eos))
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for prompt in CANONICAL:
            self._check_canonical(prompt)
        self.yes_id, self.no_id = map(self._label_id, self.template.labels)
        if self.yes_id == self.no_id:
            raise self._error(f"gives both labels {self.template.labels} the id {self.yes_id}; choose other labels")
        self.counts.clear()

    def context(self, prompt: Several[Message], response: str, aspect: str | None = None) -> Context:
        """What a thought about `response` is sampled from: [prompt, response, evaluate turn, generation head]."""
        aspect = self.aspect if aspect is None else aspect
        self._check_roles(tuple(message["role"] for message in prompt))
        messages = [*prompt, _assistant(response), _user(_fill(self.template.evaluate, aspect))]
        ids, spans = self._build(messages, head=True)
        return Context(ids, slice(0, spans[-2].start), spans[-2], aspect)

    def sequence(self, context: Context, thought_ids: Several[int]) -> Sequence:
        """`context`, the thought as it was sampled, the rate turn and the generation head.

        A thought that does not end with the end-of-turn gets it appended, outside the `thought` span: it is not trained.
        """
        closing, rate, head = self._tail(self.aspect if context.aspect is None else context.aspect)
        if thought_ids and thought_ids[-1] == self.end_id:
            closing = closing[1:]
        thought = slice(len(context.ids), len(context.ids) + len(thought_ids))
        start = thought.stop + len(closing)
        ids = [*context.ids, *thought_ids, *closing, *rate, *head]
        return Sequence(ids, context.prompt, context.response, thought, slice(start, start + len(rate)))

    def plain(self, prompt: Several[Message], response: str) -> Sequence:
        """[prompt, response, end-of-turn]: what a reward head scores, at the last id. `thought` and `rate` are empty."""
        ids, spans = self._build([*prompt, _assistant(response)], head=False)
        response_span = spans[-1]
        if ids[response_span.stop] != self.end_id:
            raise self._error("ends an assistant turn differently at the end of a conversation and inside it")
        empty = slice(response_span.stop + 1, response_span.stop + 1)
        return Sequence(ids[: empty.start], slice(0, response_span.start), response_span, empty, empty)

    def to_dict(self) -> dict[str, Any]:
        """What stands beside a trained model, so that it is scored as it was trained."""
        ids = {"yes_id": self.yes_id, "no_id": self.no_id, "end_id": self.end_id}
        return {"template": asdict(self.template), "aspect": self.aspect, **ids}

    @classmethod
    def from_dict(cls, tokenizer: "PreTrainedTokenizerBase", saved: dict[str, Any]) -> "Dialog":
        """The inverse of `to_dict`. TemplateError where it is incomplete, or the tokenizer gives other ids than it had in training."""
        try:
            fields = saved["template"]
            template = Template(fields["evaluate"], fields["rate"], tuple(fields["labels"]))
            dialog = cls(tokenizer, template, saved["aspect"])
            ids = {key: saved[key] for key in ("yes_id", "no_id", "end_id")}
        except (KeyError, TypeError) as error:
            raise TemplateError(
                f"the saved dialog is incomplete ({error!r}); save the model again, or restore the file"
            ) from error
        now = {key: getattr(dialog, key) for key in ids}
        if now != ids:
            raise TemplateError(
                f"the tokenizer {dialog.name} is not the one this model was trained with: the saved ids are {ids}, it gives {now}; "
                "load the tokenizer that was saved with the model"
            )
        return dialog

    def _error(self, what: str) -> TemplateError:
        return TemplateError(f"the chat template of {self.name} {what}")

    def _check_tokenizer(self) -> None:
        if not self.tokenizer.is_fast:
            raise TemplateError(
                f"{self.name} is a slow tokenizer; load its fast form (AutoTokenizer, with a tokenizer.json)"
            )
        if not self.tokenizer.chat_template:
            raise TemplateError(
                f"{self.name} has no chat template; give the tokenizer of the instruction-tuned model (--tokenizer_name_or_path) "
                "or set `tokenizer.chat_template`"
            )
        if any(date in str(self.tokenizer.chat_template) for date in ("strftime_now", "date_string")):
            info_once(
                f"the chat template of {self.name} prints the date; it is held at {TODAY:%d %b %Y} so that runs can be repeated"
            )

    def _render(self, messages: Several[Message], head: bool) -> str:
        from jinja2.exceptions import TemplateError as JinjaError

        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=head,
                date_string=TODAY.strftime("%d %b %Y"),
                strftime_now=TODAY.strftime,
            )
        except JinjaError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise self._error(f"refuses the roles ({roles}): {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _render_structure(self, roles: tuple[str, ...], head: bool) -> _Structure:
        places = [PLACEHOLDER.format(i) for i in range(len(roles))]
        messages: list[Message] = [{"role": role, "content": place} for role, place in zip(roles, places, strict=True)]
        texts, rest = [], self._render(messages, head)
        for role, place in zip(roles, places, strict=True):
            before, found, rest = rest.partition(place)
            if not found or place in rest:
                raise self._error(
                    f"repeats, drops or reorders the '{role}' turn in a conversation of {', '.join(roles)}"
                )
            texts.append(before)
        texts.append(rest)
        return _Structure(tuple(texts), tuple(tuple(self._contents.whole(text)) for text in texts))

    def _check_roles(self, roles: tuple[str, ...]) -> None:
        """The template must leave [prompt, response, evaluate turn, head] as it is once the thought and the rate turn follow."""
        context = self._structure((*roles, "assistant", "user"), True)
        full = self._structure((*roles, "assistant", "user", "assistant", "user"), True)
        usual = self._structure(("user", "assistant") * 2 + ("user",), True)
        if full.texts[:-2] != context.texts or full.texts[-2:] != usual.texts[-2:]:
            raise self._error(
                f"rewrites earlier turns, or opens a think block, when turns follow (roles {', '.join(roles)}); use a template without"
            )

    def _build(self, messages: Several[Message], head: bool) -> tuple[list[int], list[slice]]:
        """The ids of a conversation, and the span of each content in them."""
        structure = self._structure(tuple(message["role"] for message in messages), head)
        rendered = self._render(messages, head)
        contents = self._as_rendered(structure, messages, rendered)
        ids: list[int] = []
        spans = []
        for segment, content in zip(structure.ids[:-1], contents, strict=True):
            ids += segment
            start = len(ids)
            ids += self._contents(content)
            spans.append(slice(start, len(ids)))
        ids += structure.ids[-1]
        whole = self._contents.whole(rendered)
        if whole != ids:
            forged = self._contents.count_control(whole) != self._contents.count_control(ids)
            self.counts["control text" if forged else "merged"] += 1
        return ids, spans

    def _as_rendered(self, structure: _Structure, messages: Several[Message], rendered: str) -> list[str]:
        """The contents as the template shows them: as they are or, where it trims, trimmed."""
        contents = [message["content"] for message in messages]
        if rendered == _interleave(structure.texts, contents):
            return contents
        shown, place = [], len(structure.texts[0])
        for content, after in zip(contents, structure.texts[1:], strict=True):
            if not rendered.startswith(content + after, place):
                content = content.strip()
            shown.append(content)
            place += len(content) + len(after)
        if rendered == _interleave(structure.texts, shown):
            self.counts["trimmed"] += 1
            return shown
        self.counts["rewritten"] += 1
        return contents

    def _build_tail(self, aspect: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """What follows a thought, the same in every conversation: its turn's closing, the rate turn's text, the head."""
        turns = [_assistant("Five."), _user(_fill(self.template.evaluate, aspect)), _assistant("It is right.")]
        messages = [*CANONICAL[0], *turns, _user(_fill(self.template.rate, aspect))]
        structure = self._structure(tuple(message["role"] for message in messages), True)
        rate = self._as_rendered(structure, messages, self._render(messages, True))[-1]
        return structure.ids[-2], self._contents(rate), structure.ids[-1]

    def _check_canonical(self, prompt: tuple[Message, ...]) -> None:
        """On plain turns our ids are those of tokenizing the rendered conversation."""
        thought = "The answer is right and short."
        context = self.context(prompt, "It is five.")
        ours = self.sequence(context, self._contents(thought)).ids
        turns = [_assistant("It is five."), _user(_fill(self.template.evaluate, self.aspect)), _assistant(thought)]
        rendered = self._render([*prompt, *turns, _user(_fill(self.template.rate, self.aspect))], True)
        self._check_equal(ours, self._contents.whole(rendered))
        plain = self.plain(prompt, "It is five.").ids
        self._check_equal(plain, self._contents.whole(self._render([*prompt, turns[0]], False))[: len(plain)])

    def _check_equal(self, ours: list[int], theirs: list[int]) -> None:
        if ours == theirs:
            return
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        near = [self.tokenizer.decode(ids[max(0, place - 4) : place + 4]) for ids in (ours, theirs)]
        raise self._error(
            f"merges a turn's text with what stands around it, or rewrites it, at token {place} of plain turns: "
            f"turn by turn {near[0]!r}, as a whole {near[1]!r}; change the evaluate or rate turn where they stand there, "
            "or use another chat template"
        )

    def _label_id(self, label: str) -> int:
        """The one id of a label where it is read: after the generation head of the rate turn."""
        context = self.context(CANONICAL[0], "It is five.")
        text = self._render(
            [*CANONICAL[0], _assistant("It is five."), _user(_fill(self.template.evaluate, self.aspect))], True
        )
        alone, together = list(self._contents(label)), self._contents.whole(text + label)
        if len(alone) != 1 or together != context.ids + alone:
            raise self._error(
                f"does not leave the label {label!r} one token: by itself it is {self.tokenizer.convert_ids_to_tokens(alone)}, "
                f"after the generation head {self.tokenizer.convert_ids_to_tokens(together[-len(alone) - 1 :])}; choose other labels"
            )
        if alone[0] == self.tokenizer.unk_token_id:
            raise self._error(
                f"has no token for the label {label!r}: it is unknown to the vocabulary; choose other labels"
            )
        return alone[0]


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _fill(text: str, aspect: str) -> str:
    return text.replace("{aspect}", aspect)


def _interleave(texts: Several[str], contents: Several[str]) -> str:
    return "".join([part for pair in zip(texts[:-1], contents, strict=True) for part in pair]) + texts[-1]
