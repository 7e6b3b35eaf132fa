"""A conversation as token ids with named spans: [prompt, response, evaluate turn, thought, rate turn, head].

The chat template gives the structure, never the contents: it renders each sequence of roles once, with placeholders;
what stands between them becomes fixed segments of ids. Contents are encoded by a tokenizer in which control tokens do
not arise, so a response that spells a turn forges none. Ids are the truth: a thought is appended as it was sampled.

Not covered: templates that open a think block in the generation head, or rewrite earlier turns; they are refused.
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
# transformers gives templates plain data only, so the clock is replaced inside the template; jinja eats the newline.
DIRECTIVES = "".join(f" | replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBdeHIjmMpSyY")
CLOCK = "{% macro strftime_now(format) %}{{ format | replace('%-', '%')" + DIRECTIVES + " }}{% endmacro %}\n"
PLACEHOLDER = "[[content-{}]]"
CANONICAL: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "What is two plus three?"},),
    (
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And another one, please."},
    ),
)
CANONICAL_RESPONSE = "It is five."
CANONICAL_THOUGHT = "The answer is right and short."


@dataclass(frozen=True)
class Template:
    """The two turns that make a model judge, and the two labels. Both turns may hold "{aspect}"."""

    evaluate: str = (
        "Now review the assistant's last response with regard to {aspect}. Work through what it does well, where it "
        "goes wrong and what it leaves out, and say how much each point matters. Do not give a verdict yet."
    )
    rate: str = (
        "On the strength of your review, is that response good with regard to {aspect}? Reply with Yes or No only."
    )
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
    """What is scored, at the last id.

    `prompt` and `response` are those of the context, `thought` spans the trained ids (with a sampled end-of-turn) and
    `rate` the text of the rate turn.
    """

    ids: list[int]
    prompt: slice
    response: slice
    thought: slice
    rate: slice


@dataclass(frozen=True, slots=True)
class _Structure:
    """What a template puts around the contents of one sequence of roles: n contents, n + 1 segments."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


class Dialog:
    """Builds every sequence that is sampled from, trained on or scored, for one tokenizer, template and aspect.

    `end_id` ends a turn, `stop_ids` end a thought, `pad_id` may be anything since padding is masked. `counts` says of
    how many conversations built so far

    - "trimmed": the chat template strips a content; we do the same;
    - "rewritten": it changes a content in another way; we do not;
    - "control text": a content spells a control token; its ids are those of the letters;
    - "merged": the ids differ otherwise from tokenizing the rendered conversation, a content's start or end having
      merged with what stands beside it.

    Raises TemplateError, naming the tokenizer, where its chat template does not fit: it gives other ids on plain turns,
    refuses a role, rewrites earlier turns, has no end-of-turn token, or a label is not one token.
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
        self._structure = functools.lru_cache(maxsize=1024)(self._render_structure)
        self._tail = functools.lru_cache(maxsize=256)(self._build_tail)

        closing = self._tail(aspect)[0]
        if not closing or closing[0] not in self._contents.control:
            raise self._error(
                "does not end an assistant turn with a control token, so its end cannot be told from text"
            )
        self.end_id: int = closing[0]
        eos = tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = (self.end_id,) if eos in (None, self.end_id) else (self.end_id, int(eos))
        self.pad_id: int = self._padding()
        for prompt in CANONICAL:
            self._check_canonical(prompt)
        self.yes_id, self.no_id = map(self._label_id, self.template.labels)
        if self.yes_id == self.no_id:
            raise self._error(f"gives both labels {self.template.labels} the id {self.yes_id}; choose other labels")
        self.counts.clear()

    def context(self, prompt: Several[Message], response: str, aspect: str | None = None) -> Context:
        """What a thought about `response` is sampled from: [prompt, response, evaluate turn, generation head]."""
        self._check_roles(_roles(prompt))
        evaluate = _fill(self.template.evaluate, self.aspect if aspect is None else aspect)
        ids, spans = self._build([*prompt, _assistant(response), _user(evaluate)], head=True)
        return Context(ids, slice(0, spans[-2].start), spans[-2], aspect)

    def sequence(self, context: Context, thought_ids: Several[int]) -> Sequence:
        """`context`, the thought as it was sampled, the rate turn and the generation head.

        A thought that does not end with the end-of-turn gets it appended, outside `thought`: that one is not trained.
        """
        closing, rate, head = self._tail(self.aspect if context.aspect is None else context.aspect)
        if thought_ids and thought_ids[-1] == self.end_id:
            closing = closing[1:]
        thought = slice(len(context.ids), len(context.ids) + len(thought_ids))
        start = thought.stop + len(closing)
        ids = [*context.ids, *thought_ids, *closing, *rate, *head]
        return Sequence(ids, context.prompt, context.response, thought, slice(start, start + len(rate)))

    def plain(self, prompt: Several[Message], response: str) -> Sequence:
        """[prompt, response, end-of-turn]: what a reward head scores. `thought` and `rate` are empty."""
        ids, spans = self._build([*prompt, _assistant(response)], head=False)
        end = spans[-1].stop
        if ids[end : end + 1] != [self.end_id]:
            raise self._error("ends the last assistant turn differently from earlier ones")
        empty = slice(end + 1, end + 1)
        return Sequence(ids[: end + 1], slice(0, spans[-1].start), spans[-1], empty, empty)

    def to_dict(self) -> dict[str, Any]:
        """What stands beside a trained model, so that it is scored as it was trained."""
        template = asdict(self.template) | {"labels": list(self.template.labels)}
        return {"template": template, "aspect": self.aspect, **self._ids()}

    @classmethod
    def from_dict(cls, tokenizer: "PreTrainedTokenizerBase", saved: dict[str, Any]) -> "Dialog":
        """The inverse of `to_dict`; TemplateError where something is missing or the tokenizer is another one."""
        try:
            fields = saved["template"]
            yes, no = fields["labels"]
            dialog = cls(tokenizer, Template(fields["evaluate"], fields["rate"], (yes, no)), saved["aspect"])
            ids = {key: saved[key] for key in dialog._ids()}
        except KeyError as error:
            raise TemplateError(
                f"the saved dialog has no {error}; restore the file, or save the model again"
            ) from error
        if ids != dialog._ids():
            raise TemplateError(
                f"{dialog.name} is not the tokenizer this model was trained with: it gives {dialog._ids()}, saved were "
                f"{ids}; load the one that was saved with the model"
            )
        return dialog

    def _ids(self) -> dict[str, int]:
        return {"yes_id": self.yes_id, "no_id": self.no_id, "end_id": self.end_id}

    def _padding(self) -> int:
        """The tokenizer's, unless it ends turns: a classifier's score is read at the last id that is not padding."""
        given = self.tokenizer.pad_token_id
        if given is not None and given not in self.stop_ids:
            return int(given)
        unused = self._contents.control.difference(self.stop_ids, {self.tokenizer.bos_token_id})
        return max(unused, default=self.end_id)

    def _error(self, what: str) -> TemplateError:
        return TemplateError(f"the chat template of {self.name} {what}")

    def _check_tokenizer(self) -> None:
        if not self.tokenizer.is_fast:
            raise TemplateError(f"{self.name} is a slow tokenizer; load its fast form, the one with a tokenizer.json")
        if not self.tokenizer.chat_template:
            raise TemplateError(
                f"{self.name} has no chat template; give the tokenizer of the instruction-tuned model "
                "(--tokenizer_name_or_path), or set `tokenizer.chat_template`"
            )
        self._chat_template = self.tokenizer.get_chat_template()
        clock = "strftime_now" in self._chat_template
        if clock:
            self._chat_template = CLOCK + self._chat_template
        if clock or "date_string" in self._chat_template:
            info_once(
                f"the chat template of {self.name} prints the date: held at {TODAY:%d %b %Y}, so that runs repeat"
            )

    def _apply(self, messages: Several[Message], head: bool, tokenize: bool) -> Any:
        from jinja2.exceptions import TemplateError as JinjaError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._chat_template,
                tokenize=tokenize,
                return_dict=False,
                add_generation_prompt=head,
                date_string=TODAY.strftime("%d %b %Y"),
            )
        except JinjaError as error:
            raise self._error(f"refuses the roles ({', '.join(_roles(messages))}): {error}") from error

    def _render(self, messages: Several[Message], head: bool) -> str:
        return self._apply(messages, head, tokenize=False)

    def _render_structure(self, roles: tuple[str, ...], head: bool) -> _Structure:
        places = [PLACEHOLDER.format(i) for i in range(len(roles))]
        messages: list[Message] = [{"role": r, "content": place} for r, place in zip(roles, places, strict=True)]
        texts, rest = [], self._render(messages, head)
        for role, place in zip(roles, places, strict=True):
            before, found, rest = rest.partition(place)
            if not found or place in rest:
                raise self._error(
                    f"repeats, drops, moves or rewrites a '{role}' turn in the roles ({', '.join(roles)})"
                )
            texts.append(before)
        texts.append(rest)
        return _Structure(tuple(texts), tuple(tuple(self._contents.whole(text)) for text in texts))

    def _check_roles(self, roles: tuple[str, ...]) -> None:
        """The thought and the rate turn must leave [prompt, response, evaluate turn, head] as the sampler saw it."""
        context = self._structure((*roles, "assistant", "user"), True)
        full = self._structure((*roles, "assistant", "user", "assistant", "user"), True)
        usual = self._structure((*_roles(CANONICAL[0]), "assistant", "user", "assistant", "user"), True)
        if full.texts[:-2] != context.texts or full.texts[-2:] != usual.texts[-2:]:
            raise self._error(
                f"shows earlier turns differently once others follow (roles {', '.join(roles)}), or opens a think "
                "block in the generation head; use one that does not"
            )

    def _build(self, messages: Several[Message], head: bool) -> tuple[list[int], list[slice]]:
        """The ids of a conversation, and the span of each content in them."""
        structure = self._structure(_roles(messages), head)
        rendered = self._render(messages, head)
        ids: list[int] = []
        spans = []
        contents = self._as_rendered(structure, [message["content"] for message in messages], rendered)
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

    def _as_rendered(self, structure: _Structure, contents: list[str], rendered: str) -> list[str]:
        """The contents as the template shows them: as they are or, where it trims, trimmed."""
        if rendered == _interleave(structure.texts, contents):
            return contents
        shown, place = [], len(structure.texts[0])
        for content, after in zip(contents, structure.texts[1:], strict=True):
            shown.append(content if rendered.startswith(content + after, place) else content.strip())
            place += len(shown[-1]) + len(after)
        if rendered == _interleave(structure.texts, shown):
            self.counts["trimmed"] += 1
            return shown
        self.counts["rewritten"] += 1
        return contents

    def _canonical(self, prompt: tuple[Message, ...], aspect: str) -> list[Message]:
        evaluate, rate = (_fill(text, aspect) for text in (self.template.evaluate, self.template.rate))
        turns = [_assistant(CANONICAL_RESPONSE), _user(evaluate), _assistant(CANONICAL_THOUGHT), _user(rate)]
        return [*prompt, *turns]

    def _build_tail(self, aspect: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """What follows a thought, whatever the conversation: its turn's closing, the rate turn's text, the head."""
        messages = self._canonical(CANONICAL[0], aspect)
        structure = self._structure(_roles(messages), True)
        contents = [message["content"] for message in messages]
        rate = self._as_rendered(structure, contents, self._render(messages, True))[-1]
        return structure.ids[-2], self._contents(rate), structure.ids[-1]

    def _check_canonical(self, prompt: tuple[Message, ...]) -> None:
        """On plain turns, our ids are those that the tokenizer gives the conversation as a whole."""
        messages = self._canonical(prompt, self.aspect)
        thought = self._contents(CANONICAL_THOUGHT)
        ours = self.sequence(self.context(prompt, CANONICAL_RESPONSE), thought).ids
        self._check_equal(ours, self._apply(messages, head=True, tokenize=True))
        ours = self.plain(prompt, CANONICAL_RESPONSE).ids
        theirs = self._apply(messages[: len(prompt) + 1], head=False, tokenize=True)
        self._check_equal(ours, theirs[: len(ours)])

    def _check_equal(self, ours: list[int], theirs: list[int]) -> None:
        if ours == theirs:
            return
        same = (a == b for a, b in zip(ours, theirs, strict=False))
        place = next((i for i, equal in enumerate(same) if not equal), min(len(ours), len(theirs)))
        ours_near, theirs_near = (
            self.tokenizer.convert_ids_to_tokens(ids[max(0, place - 3) : place + 4]) for ids in (ours, theirs)
        )
        raise self._error(
            f"rewrites a plain turn's text, or merges it with what stands beside it, at token {place}: turn by turn "
            f"{ours_near}, as a whole {theirs_near}; change the evaluate or rate turn if it is theirs, or use another "
            "chat template"
        )

    def _label_id(self, label: str) -> int:
        """The one id of a label where it is read: after the generation head of the rate turn."""
        rendered = self._render(self._canonical(CANONICAL[0], self.aspect), True)
        before = self._contents.whole(rendered)
        alone, after = list(self._contents(label)), self._contents.whole(rendered + label)
        if len(alone) != 1 or after != before + alone:
            by_itself, read = map(self.tokenizer.convert_ids_to_tokens, (alone, after[len(before) - 1 :]))
            raise self._error(
                f"does not leave the label {label!r} one token: by itself it is {by_itself}, with the end of the "
                f"generation head {read}; choose other labels"
            )
        if alone[0] == self.tokenizer.unk_token_id:
            raise TemplateError(f"{self.name} does not know the label {label!r}; choose labels of its vocabulary")
        return alone[0]


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _fill(text: str, aspect: str) -> str:
    return text.replace("{aspect}", aspect)


def _roles(messages: Several[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def _interleave(texts: tuple[str, ...], contents: list[str]) -> str:
    return "".join(part for pair in zip(texts[:-1], contents, strict=True) for part in pair) + texts[-1]
