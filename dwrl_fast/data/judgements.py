"""DEMONSTRATION: rows with a `prompt`, the `response` or `responses` to it, a `thought` about these, its `verdict`."""

from dataclasses import dataclass
from typing import Any

from dwrl_fast.data.columns import Columns, Unusable, check_text, conversation
from dwrl_fast.data.preference import Preference


@dataclass(frozen=True, slots=True)
class Demonstration(Preference):
    """A judgement of one response, or of two, to be learnt word by word. It does not say which response is preferred:
    two stand in the order in which they are shown.

    verdict: a label, a letter or a number, as the template asks for one; empty where the thought ends with it.
    """

    thought: str = ""
    verdict: str = ""

    @property
    def content(self) -> list[Any]:
        """All that is trained on, as JSON can hold it."""
        return [*Preference.content.fget(self), self.thought, self.verdict]  # type: ignore[attr-defined]


def demonstration(row: Columns) -> Demonstration:
    """Raises DataError or Unusable."""
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
