"""Reads the columns of one row under this package's names, checks their types, and builds conversations from turns.

There are two kinds of faults. A malformed row (a missing column, a number instead of a text) raises DataError: the file
does not have the expected format. A well-formed row without a comparison raises Unusable: it is dropped and counted,
and the other rows are used.
"""

import difflib
import itertools
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwrl_fast.data.preference import Message, Preference
from dwrl_fast.data.table_text import is_transcript, parsed
from dwrl_fast.errors import DataError

TEXTS = (
    *("prompt", "context", "chosen", "rejected", "completion", "responses", "completions"),
    *("response", "thought"),
)
ROLES = ("system", "user", "assistant")
OWN = ("role", "content")
REQUIRED: Any = object()

Turns = list[Message]

SHORT = reprlib.Repr()  # shortens values of any size and depth
SHORT.maxstring = SHORT.maxother = 60


class Unusable(Exception):
    """The reason why a row holds no comparison."""


@dataclass(frozen=True, slots=True)
class Columns:
    """One row. `mapping` maps this package's column names to those of the file; `source` is its "file:line". nulls:
    whether a null means a missing column, as in tables, where every row has every column. unread: counts message fields
    that are not read.
    """

    values: Mapping[str, Any]
    source: str
    mapping: Mapping[str, str]
    nulls: bool = False
    unread: Counter[str] | None = None

    def names(self, name: str) -> bool:
        """Whether the row has the column, possibly with a null."""
        return self.mapping.get(name, name) in self.values

    def has(self, name: str) -> bool:
        """Whether the row has the column, with a value."""
        return self.values.get(self.mapping.get(name, name)) is not None

    def column(self, name: str, default: Any = REQUIRED) -> Any:
        """A column's value; `default` if it is missing. Raises DataError if it is required, Unusable for a null
        text.
        """
        key = self.mapping.get(name, name)
        value = self.values.get(key)
        if value is not None:
            return value
        if key in self.values:
            if name not in TEXTS:
                return None
            if default is REQUIRED:
                raise Unusable(f"null {name}")
            return default
        if default is not REQUIRED and name not in self.mapping:
            return default
        others = ", or --layout transcripts: the texts look like those" if self._transcripts(name) else ""
        raise DataError(
            f"{self.source}: no column '{key}' among {quoted(self.values)}; name it with --columns "
            f"{name}={nearest(key, self.values) or 'NAME'}{others}"
        )

    def _transcripts(self, name: str) -> bool:
        return name == "prompt" and any(map(is_transcript, self.values.values()))

    def turns(self, name: str, role: str, default: Any = REQUIRED) -> Turns:
        """A column as turns; a string is one turn of `role`."""
        return self.as_turns(name, self.column(name, default), role)

    def as_turns(self, name: str, value: Any, role: str) -> Turns:
        """`value`, of column `name`, as turns; a string is one turn of `role`."""
        if isinstance(value, str):
            check_text(value)
            return [{"role": role, "content": value}]
        if not isinstance(value, list):
            cure = "--layout single_messages reads one message" if isinstance(value, dict) and value else ""
            raise self.mistyped(name, value, "a string or a list of messages", cure)
        return [self._message(name, message) for message in value]

    def prompt(self, responses: Iterable[Any], name: str = "prompt") -> Turns:
        """The prompt. It may be missing if all responses are conversations that contain it."""
        return self.turns(name, "user", REQUIRED if any(isinstance(value, str) for value in responses) else [])

    def preference(self, prompt: tuple[Message, ...], responses: tuple[str, ...], **more: Any) -> Preference:
        """A group with the row's aspect, source and labels."""
        subset, name = self.label("subset"), self.label("id")
        return Preference(prompt, responses, aspect=self.aspect(), source=self.source, subset=subset, id=name, **more)

    def sequence(self, name: str) -> list[Any]:
        """A column as a list."""
        value = self.column(name)
        value = parsed(value)
        if not isinstance(value, list):
            raise self.mistyped(name, value, "a list")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A column as a finite number."""
        value = self.column(name, default)
        if value is default or (value is None and self.nulls and default is not REQUIRED):
            return float(default)
        return self.as_number(name, value)

    def as_number(self, name: str, value: Any) -> float:
        """`value`, of column `name`, as a finite number."""
        value = parsed(value)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            graded = name == "score" and isinstance(value, bool)
            raise self.mistyped(
                name, value, "a number", "with --columns label=score, true and false are read as scores" * graded
            )
        try:
            number = math.nan if value is None else float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise Unusable(f"{name} is not a finite number")
        return number

    def aspect(self) -> str | None:
        """The column `aspect`, if it is present and not blank."""
        value = self.column("aspect", default=None)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str):
            raise self.mistyped("aspect", value, "a string")
        check_text(value)
        return value

    def label(self, name: str) -> str | None:
        """A column that only names the row, as text; None if it is missing or neither a text nor a whole number."""
        value = self.column(name, default=None)
        if value is None or isinstance(value, bool) or not isinstance(value, str | int):
            return None
        return str(value).encode(errors="replace").decode()

    def _message(self, name: str, message: Any) -> Message:
        if not (isinstance(message, dict) and "role" in message and "content" in message):
            known = isinstance(message, dict) and {"from", "value"} <= message.keys()
            cure = "--layout sharegpt reads from and value" if known else ""
            raise self.mistyped(name, message, "messages with 'role' and 'content'", cure)
        role, content = message["role"], message["content"]
        if message.get("tool_calls"):
            raise Unusable("tool calls")
        if content is None:
            raise Unusable("null content")
        if not isinstance(role, str) or not isinstance(content, str):
            cure = "--layout content_parts joins parts of text" if isinstance(content, list) else ""
            raise self.mistyped(name, message, "messages whose role and content are strings", cure)
        if role not in ROLES:
            raise Unusable(f"unknown role {role[:20]!r}")
        check_text(content)
        if self.unread is not None and len(message) > 2:
            self.unread.update(key for key, value in message.items() if key not in OWN and value)
        return {"role": role, "content": content}

    def mistyped(self, name: str, value: Any, wanted: str, cure: str = "") -> DataError:
        """The error for a `value` of the wrong type in column `name`. cure: what may help."""
        said = f"'{name}' should hold {wanted}, not the {type(value).__name__} {SHORT.repr(value)[:60]}"
        return DataError(f"{self.source}: {said}" + (f"; {cure}" if cure else ""))


def quoted(names: Mapping[str, Any]) -> str:
    """Column names for a message, shortened if there are many."""
    shown = ", ".join(repr(name[:40]) for name in list(names)[:12])
    return (shown + ", ..." if len(names) > 12 else shown) or "none"


def differing_fields(a: Any, b: Any) -> str:
    """The fields, other than role and content, in which the last messages of `a` and `b` differ; empty if there are
    none.
    """
    one, other = (side[-1] if isinstance(side, list) and side else {} for side in (a, b))
    names = [name for name in {**one, **other} if name not in OWN and one.get(name) != other.get(name)]
    return quoted(dict.fromkeys(names)) if names else ""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that `name` probably means, among names that can be typed."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return near[0] if near and near[0].isprintable() else None


def check_text(text: str) -> None:
    """Raises Unusable if a text cannot be encoded."""
    if text.isascii():  # Python knows this without scanning the text
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("a lone surrogate, which is not valid text") from None


def conversation(prompt: Turns, sides: Sequence[Turns]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The prompt of a conversation, and the text of the last turn of each of `sides`, which answers it.

    Each side may hold the whole conversation; `prompt` may then repeat its beginning or be empty. Raises Unusable if
    the sides are not assistant answers to one prompt.
    """
    shared = _shared(sides) if any(len(side) > 1 for side in sides) else []
    # Turns that begin with an answer continue the prompt, even if they repeat parts of it.
    repeated = shared and shared[0]["role"] != "assistant" and all(turn in shared for turn in prompt)
    prompt = shared if repeated else prompt + shared
    if max(map(len, sides)) > len(shared) + 1:
        raise Unusable("prompts differ")
    responses = []
    for side in sides:
        if len(side) == len(shared) or not (text := side[-1]["content"]).strip():
            raise Unusable("empty response")
        if side[-1]["role"] != "assistant":
            raise Unusable("the response is not an assistant turn")
        responses.append(text)
    check_prompt(prompt)
    return tuple(prompt), tuple(responses)


def _shared(sides: Sequence[Turns]) -> Turns:
    """The leading turns that all sides share, without the last turn of any side. For one side, all turns but the
    last.
    """
    first, *others = sides
    count, most = 0, min(map(len, sides)) - 1
    while count < most and all(side[count] == first[count] for side in others):
        count += 1
    return first[:count]


def check_prompt(prompt: Turns) -> None:
    """Raises Unusable if an assistant's turn cannot follow the prompt."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if not turns:
        raise Unusable("empty prompt")
    roles = [turn["role"] for turn in turns]
    if "system" in roles:
        raise Unusable("a system turn inside the conversation")
    for turn in turns:
        if not turn["content"].strip():
            raise Unusable("empty turn in the prompt" if len(turns) > 1 else "empty prompt")
    if any(a == b for a, b in itertools.pairwise([*roles, "assistant"])):
        raise Unusable("consecutive turns of one role")
