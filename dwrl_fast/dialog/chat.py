"""A tokenizer's chat template as fixed segments of ids around contents. Contents cannot become control tokens.

The template gives only the structure. It renders each sequence of roles once, with placeholders, and the text between
the placeholders becomes segments of ids. Contents are encoded by a tokenizer that produces no control tokens, so a
response that spells a turn cannot forge one.

Think blocks are kept where the sampler saw them. `enable_thinking` says whether a thought may start with a think block.
A label is always read in a turn without one. Reasoning that a template would remove from earlier turns is kept.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from dwrl_fast.data import Message
from dwrl_fast.dialog.contents import ContentTokenizer
from dwrl_fast.dialog.limits import LimitError, check_size, watched, within_bounds
from dwrl_fast.dialog.sequence import TokenSequence
from dwrl_fast.errors import LabelError, OverrunError, TemplateError
from dwrl_fast.log import info_once
from dwrl_fast.templates import Template, read_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)  # for templates that print the date: a run must not depend on the current day
# transformers passes only plain data to templates, so the clock is replaced inside the template. Jinja removes the
# newline.
DIRECTIVES = "".join(f" | replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBdeHIjmMpSyY")
CLOCK = "{% macro strftime_now(format) %}{{ format | replace('%-', '%')" + DIRECTIVES + " }}{% endmacro %}\n"
PLACEHOLDER = "[[content-{}]]"
DEFAULT_ASPECT = "helpfulness"
THINK = re.compile(r"\s*<think>\s*(</think>\s*)?")

Thinking = Literal["auto", "off", "on"]
Head = Literal["thought", "label"]
"""The generation head after a conversation: the one before a sampled thought, or the one before a label."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The segments that a template puts around the contents of one sequence of roles: n contents, n + 1 segments."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


def named_aspect(saved: Mapping[str, Any]) -> str | None:
    """The aspect that somebody named for a saved dialog; None if it asks about DEFAULT_ASPECT because nobody did."""
    aspect = saved["aspect"]
    return None if aspect == DEFAULT_ASPECT and not saved.get("aspect_named") else aspect


class Chat:
    """Builds conversations as ids, with the span of each content, for one tokenizer and its chat template.

    `end_id` ends a turn, `stop_ids` end a thought, `pad_id` may be any id because padding is masked. `counts` counts
    the conversations built so far for which

    - "trimmed": the chat template strips a content, and so does this class;
    - "reasoning kept": it would remove the think block from an earlier turn; the block is kept;
    - "rewritten": it would change a content in another way; the content is kept unchanged;
    - "control text": a content spells a control token; it is encoded as ordinary text;
    - "merged": the ids differ in another way from those of the rendered conversation, because there the start or end of
    a content merges with the text next to it.

    After construction `enable_thinking` is "on" or "off": whether a thought may start with a think block.

    aspect: what is asked about. None: nobody named an aspect; DEFAULT_ASPECT is asked about, but labels are not read by
    it. `named_aspect` is the argument.

    Raises TemplateError, which names the tokenizer, if its chat template does not fit: if it refuses a role, has no
    end-of-turn token, or cannot do what `enable_thinking` requires.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template, aspect: str | None, enable_thinking: Thinking
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.named_aspect = aspect
        self.aspect = DEFAULT_ASPECT if aspect is None else aspect
        self.name = f"{type(tokenizer).__name__} {tokenizer.name_or_path}".strip()
        self.counts: Counter[str] = Counter()
        self._check_tokenizer()
        self._contents = ContentTokenizer(tokenizer)
        self._structure = functools.lru_cache(maxsize=1024)(self._render_structure)
        self._set_thinking(enable_thinking)

        closing = self._structure(("user", "assistant", "user"), None).ids[2]
        if not closing or closing[0] not in self._contents.control:
            raise self.error("does not end an assistant turn with a control token, so its end cannot be told from text")
        self.end_id: int = closing[0]
        eos = tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = (self.end_id,) if eos in (None, self.end_id) else (self.end_id, int(eos))
        self.pad_id: int = self._padding()

    @property
    def dated(self) -> bool:
        """Whether the chat template prints the date. The date is then fixed."""
        return "strftime_now" in self._chat_template or "date_string" in self._chat_template

    def completion(self, prompt: Sequence[Message], response: str) -> TokenSequence:
        """[prompt, response, end-of-turn]; the trained tokens are those of the response and its end-of-turn."""
        ids, spans, _ = self._build([*prompt, assistant(response)], None)
        end = spans[-1].stop
        if ids[end : end + 1] != [self.end_id]:
            raise self.error("ends the last assistant turn differently from earlier ones")
        trained, empty = slice(spans[-1].start, end + 1), slice(end + 1, end + 1)
        return TokenSequence(ids[: end + 1], slice(0, spans[-1].start), spans[-1], trained, empty)

    def thought_ids(self, text: str) -> list[int]:
        """The ids of a given thought with the end-of-turn, as if the model had sampled it."""
        return [*self._contents(text), self.end_id]

    def special_ids(self) -> dict[str, int]:
        """The ids that the tokenizer of a saved model must reproduce."""
        return {"end_id": self.end_id}

    def to_dict(self) -> dict[str, Any]:
        """The settings saved with a trained model, so that it is scored in the same way as it was trained."""
        settings = {"aspect": self.aspect, "enable_thinking": self.enable_thinking}
        named = {"aspect_named": True} if self.named_aspect == DEFAULT_ASPECT else {}  # any other aspect was named
        return {"template": self.template.to_dict(), **settings, **named, **self.special_ids()}

    @classmethod
    def from_dict(cls, tokenizer: "PreTrainedTokenizerBase", saved: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises TemplateError if something is missing or the tokenizer is different."""
        try:
            template = read_template(saved["template"], "saved with the model")
            dialog = cls(tokenizer, template, named_aspect(saved), saved.get("enable_thinking", "auto"))
            ids = {key: saved[key] for key in dialog.special_ids()}
        except KeyError as error:
            raise TemplateError(
                f"the saved dialog has no {error}; restore the file, or save the model again"
            ) from error
        if ids != dialog.special_ids():
            raise TemplateError(
                f"{dialog.name} is not the tokenizer this model was trained with: its special ids are "
                f"{dialog.special_ids()}, the saved ones are {ids}; load the tokenizer that was saved with the model"
            )
        return dialog

    def error(self, what: str) -> TemplateError:
        """A TemplateError that names the tokenizer."""
        return TemplateError(self._said(what))

    def _said(self, what: str) -> str:
        return f"the chat template of {self.name} {what}"

    def _padding(self) -> int:
        """The tokenizer's pad id, unless it also ends turns: the score of a classifier is read at the last id that is
        not padding.
        """
        given = self.tokenizer.pad_token_id
        if given is not None and given not in self.stop_ids:
            return int(given)
        unused = self._contents.control.difference(self.stop_ids, {self.tokenizer.bos_token_id})
        return max(unused, default=self.end_id)

    def _check_tokenizer(self) -> None:
        if not self.tokenizer.is_fast:
            raise TemplateError(f"{self.name} is a slow tokenizer; load its fast form, the one with a tokenizer.json")
        if not self.tokenizer.chat_template:
            raise TemplateError(
                f"{self.name} has no chat template; give the tokenizer of the instruction-tuned model (in training "
                "--tokenizer_name_or_path), or put its chat_template into tokenizer_config.json"
            )
        self._chat_template = self.tokenizer.get_chat_template()
        if "strftime_now" in self._chat_template:
            self._chat_template = CLOCK + self._chat_template
        if self.dated:
            info_once(
                f"the chat template of {self.name} prints the date: fixed at {TODAY:%d %b %Y}, so that runs are "
                "reproducible"
            )

    def _set_thinking(self, wanted: Thinking) -> None:
        """Decide whether thoughts may have a think block, and what must be removed from a label's head so that it has
        none.
        """
        self._switch = "enable_thinking" in self._chat_template
        self.enable_thinking: Literal["off", "on"] = "on" if wanted == "on" else "off"
        self._unclosed = ""
        opened = self._opened("label")
        if not opened.rstrip().endswith("</think>"):
            self._unclosed = opened
            self._structure.cache_clear()
        if self._unclosed and wanted == "off":
            raise self.error(
                "opens a think block in every generation head and has no switch against it; use --enable_thinking "
                "on, which makes the block part of the thought, or the tokenizer of a model that does not think"
            )
        if self._unclosed:
            self.enable_thinking = "on"
        elif wanted == "on" and not self._switch:
            raise self.error(
                "does not support enable_thinking, so thinking cannot be switched on; leave --enable_thinking at "
                "auto: this model reasons in the thought itself"
            )
        self._head = self._opened("thought")
        if self.thinking_said:
            info_once(f"the chat template of {self.name} can think: {self.thinking_said}")

    @property
    def thinking_said(self) -> str:
        """How think blocks are handled, in words; empty for a template without them."""
        if not (self._switch or self._head):
            return ""
        if self.enable_thinking == "off":
            return (
                "thinking is off (--enable_thinking off). The template then puts an empty think block into the "
                "generation head. The block stays before each thought when the thought is scored, although the "
                "template shows earlier turns without it"
            )
        return (
            "thinking is on (--enable_thinking on). A thought is all that the model writes, including its think "
            "block, and it is scored unchanged, although the template removes think blocks from earlier turns. The "
            "label is read in a turn without a think block"
        )

    @property
    def alternative(self) -> str:
        """For error messages: what to use instead of a chat template that does not fit."""
        off = "--enable_thinking off, or " if self._switch and self.enable_thinking == "on" else ""
        return f"{off}another chat template"

    def _opened(self, head: Head) -> str:
        """What a generation head adds to the header of an assistant's turn: nothing, or a think block."""
        header = self._structure(("user", "assistant", "user"), None).texts[1]
        text = self._structure(("user",), head).texts[-1]
        opened = text.removeprefix(header)
        if not text.startswith(header) or (opened and not THINK.fullmatch(opened)):
            raise self.error(
                f"ends with {text!r} but an assistant's turn starts with {header!r}: a generation head may add only a "
                f"think block to that; use {self.alternative}"
            )
        return opened

    def _apply(self, messages: Sequence[Message], head: Head | None, tokenize: bool, *, first: bool = False) -> Any:
        """Run the chat template. first: whether these roles occur for the first time; then the strict limits apply,
        which cost too much for every row. Raises OverrunError if the template exceeds its limits.
        """
        from jinja2.exceptions import TemplateError as JinjaError

        thinking = {"enable_thinking": self.enable_thinking == "on" and head == "thought"} if self._switch else {}
        size = sum(len(message["content"]) for message in messages)
        render = functools.partial(
            self.tokenizer.apply_chat_template,
            [dict(message) for message in messages],
            chat_template=self._chat_template,
            tokenize=tokenize,
            return_dict=False,
            add_generation_prompt=head is not None,
            date_string=TODAY.strftime("%d %b %Y"),
            **thinking,
        )
        try:
            if first:
                with within_bounds():
                    rendered = render()
            else:
                rendered = watched(render, size)
            check_size(rendered, size)
            return rendered
        except JinjaError as error:
            raise self.error(f"refuses the roles ({', '.join(roles_of(messages))}): {error}") from error
        except (LimitError, MemoryError) as error:
            what = str(error) or "it needs more memory than any conversation should"
            begins = next((each["content"][:80] for each in messages if each["role"] == "user"), "")
            where = "" if first else f" on the conversation that begins with {begins!r}"
            remedy = "" if first else "leave that row out, or "
            raise OverrunError(
                self._said(f"cannot be run{where} ({what}); {remedy}give the tokenizer of another model")
            ) from error
        except (OverflowError, TypeError, ValueError) as error:
            raise self.error(f"cannot be run ({error}); give the tokenizer of another model") from error

    def _render(self, messages: Sequence[Message], head: Head | None, *, first: bool = False) -> str:
        text = self._apply(messages, head, tokenize=False, first=first)
        return text.removesuffix(self._unclosed) if head == "label" else text

    def _tokenized(self, messages: Sequence[Message], head: Head | None) -> list[int]:
        """The ids that the tokenizer gives for the whole conversation."""
        if head == "label" and self._unclosed:
            return self._contents.whole(self._render(messages, head))
        return self._apply(messages, head, tokenize=True)

    def _render_structure(self, roles: tuple[str, ...], head: Head | None) -> Structure:
        places = [PLACEHOLDER.format(i) for i in range(len(roles))]
        messages: list[Message] = [{"role": r, "content": place} for r, place in zip(roles, places, strict=True)]
        texts, rest = [], self._render(messages, head, first=True)
        for role, place in zip(roles, places, strict=True):
            before, found, rest = rest.partition(place)
            if not found or place in rest:
                raise self.error(f"repeats, drops, moves or rewrites a '{role}' turn in the roles ({', '.join(roles)})")
            texts.append(before)
        texts.append(rest)
        return Structure(tuple(texts), tuple(tuple(self._contents.whole(text)) for text in texts))

    def _build(self, messages: Sequence[Message], head: Head | None) -> tuple[list[int], list[slice], list[str]]:
        """The ids of a conversation, the span of each content in them, and the contents as encoded."""
        structure = self._structure(roles_of(messages), head)
        ids: list[int] = []
        spans = []
        contents = [message["content"] for message in messages]
        shown = self._as_rendered(structure, contents, self._render(messages, head))
        for segment, content in zip(structure.ids[:-1], shown, strict=True):
            ids += segment
            start = len(ids)
            ids += self._contents(content)
            spans.append(slice(start, len(ids)))
        ids += structure.ids[-1]
        whole = self._contents.whole(_interleave(structure.texts, shown))
        if whole != ids:
            forged = self._contents.count_control(whole) != self._contents.count_control(ids)
            self.counts["control text" if forged else "merged"] += 1
        return ids, spans, shown

    def _as_rendered(self, structure: Structure, contents: list[str], rendered: str) -> list[str]:
        """The contents as the template shows them: unchanged, or stripped if the template strips them."""
        if rendered == _interleave(structure.texts, contents):
            return contents
        shown, place = [], len(structure.texts[0])
        for content, after in zip(contents, structure.texts[1:], strict=True):
            shown.append(content if rendered.startswith(content + after, place) else content.strip())
            place += len(shown[-1]) + len(after)
        if rendered == _interleave(structure.texts, shown):
            self.counts["trimmed"] += 1
            return shown
        reasoned = "</think>" in self._chat_template and any("</think>" in content for content in contents)
        self.counts["reasoning kept" if reasoned else "rewritten"] += 1
        return contents

    def _check_equal(self, ours: list[int], theirs: list[int]) -> None:
        if ours == theirs:
            return
        same = (a == b for a, b in zip(ours, theirs, strict=False))
        place = next((i for i, equal in enumerate(same) if not equal), min(len(ours), len(theirs)))
        ours_near, theirs_near = (
            self.tokenizer.convert_ids_to_tokens(ids[max(0, place - 3) : place + 4]) for ids in (ours, theirs)
        )
        raise self.error(
            f"rewrites a plain turn's text, or merges it with the text next to it, at token {place}: tokenized turn "
            f"by turn it is {ours_near}, in one piece {theirs_near}; change the evaluate or rate turn if the text is "
            "from there, or use another chat template"
        )

    def _label_ids(self, labels: tuple[str, str], messages: Sequence[Message]) -> tuple[int, int]:
        """The id of each label at the position where it is read: after the label head of a conversation."""
        first, second = (self._label_id(label, messages) for label in labels)
        if first == second:
            raise LabelError(self._said(f"gives both labels {labels} the id {first}; choose other labels"))
        return first, second

    def _label_id(self, label: str, messages: Sequence[Message]) -> int:
        rendered = self._render(messages, "label")
        before = self._contents.whole(rendered)
        alone, after = list(self._contents(label)), self._contents.whole(rendered + label)
        if len(alone) != 1 or after != before + alone:
            by_itself, read = map(self.tokenizer.convert_ids_to_tokens, (alone, after[len(before) - 1 :]))
            raise LabelError(
                self._said(
                    f"does not keep the label {label!r} one token: alone it is {by_itself}, after the end of the "
                    f"generation head it is {read}; choose other labels"
                )
            )
        if alone[0] == self.tokenizer.unk_token_id:
            raise LabelError(f"{self.name} does not know the label {label!r}; choose labels of its vocabulary")
        return alone[0]


def assistant(content: str) -> Message:
    """A turn of the assistant."""
    return {"role": "assistant", "content": content}


def user(content: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def roles_of(messages: Sequence[Message]) -> tuple[str, ...]:
    """The roles of the turns, in order."""
    return tuple(message["role"] for message in messages)


def _interleave(texts: tuple[str, ...], contents: list[str]) -> str:
    return "".join(part for pair in zip(texts[:-1], contents, strict=True) for part in pair) + texts[-1]
