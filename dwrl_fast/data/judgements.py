"""DEMONSTRATION: rows with a `prompt`, a `response` or `responses`, a `thought` about them, and its `verdict`."""

from dataclasses import dataclass
from typing import Any

from dwrl_fast.data.columns import Columns, Unusable, check_text, conversation
from dwrl_fast.data.preference import Preference


@dataclass(frozen=True, slots=True)
class Demonstration(Preference):
    """A judgement of one or two responses, to be learned word by word. Two responses are in the order in which they are
    shown; the order does not say which one is preferred.

    verdict: a label, a letter or a number, as the template requires; empty if the thought ends with it.
    """

    thought: str = ""
    verdict: str = ""

    @property
    def content(self) -> list[Any]:
        """Everything that training uses, as JSON."""
        return [*Preference.content.fget(self), self.thought, self.verdict]  # type: ignore[attr-defined]


def demonstration(row: Columns) -> Demonstration:
    """The demonstration in one row. Raises DataError or Unusable."""
    name = "response" if row.names("response") else "responses"
    values = [row.column(name)] if name == "response" else row.sequence(name)
    prompt = row.prompt(values)
    if any(value is None for value in values):
        raise Unusable("null response")
    turns, responses = conversation(prompt, [row.as_turns(name, value, "assistant") for value in values])
    thought = row.column("thought")
    if not isinstance(thought, str):
        raise row.mistyped("thought", thought, "a string")
    check_text(thought)
    return Demonstration(
        turns, responses, aspect=row.aspect(), source=row.source, thought=thought, verdict=_verdict(row)
    )


def _verdict(row: Columns) -> str:
    value = row.column("verdict", default=None)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise row.mistyped("verdict", value, "a label, a letter or a number")
    if isinstance(value, str):
        check_text(value)
        return value.strip()
    return "" if value is None else f"{row.as_number('verdict', value):g}"
