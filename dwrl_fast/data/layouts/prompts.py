"""Finds the prompt of a published row."""

from typing import Any

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.layouts.layout import Published, found, listed
from dwrl_fast.data.messages import transcript, turns
from dwrl_fast.data.table_text import Cell, is_transcript

SYSTEM = "system|system_prompt|system_message"
MESSAGES = "messages|conversations|conversation|trajectory"
TEXT = "prompt|question|instruction|orig_instruction|query|user_prompt|context|history|post|article|input"
PROMPT = f"{TEXT}|{MESSAGES}"


def prompt(row: Published) -> dict[str, Any]:
    """The column `prompt`, if the row has one under any of its names: a text, or turns if there are several turns, a
    system prompt or a history. Raises Unusable if there are two system prompts.
    """
    name = found(row.values, PROMPT)
    before = [*_system(row), *_history(row, name)]
    if name is None:
        return {"prompt": before} if before else {}
    value = content(row.get(name))
    value = value["full_text"] if isinstance(value, dict) and "full_text" in value else value  # WebGPT's form
    if name == "instruction" and isinstance(value, str):
        more = row.get("input", "")
        value = f"{value}\n{more}" if isinstance(more, str) and more.strip() else value
    if not before:
        return {"prompt": value}
    asked = value if isinstance(value, list) else [{"role": "user", "content": value}]
    if asked[:1] == before[:1]:
        return {"prompt": asked}
    if before[0]["role"] == "system" and asked and isinstance(asked[0], dict) and asked[0].get("role") == "system":
        raise Unusable("two system prompts")
    return {"prompt": before + asked}


def content(value: Any) -> Any:
    """Text or turns in any known form. A transcript loses its last heading, that of the answer."""
    if isinstance(value, Cell) and isinstance(value.parsed, list | dict):
        value = value.parsed
    if not is_transcript(value):
        return turns(value)
    said = transcript(value)
    if said[-1]["role"] == "assistant" and not said[-1]["content"]:
        said.pop()
    return said


def _system(row: Published) -> list[dict[str, Any]]:
    value = row.get(SYSTEM, "")
    return [{"role": "system", "content": value}] if not isinstance(value, str) or value.strip() else []


def _history(row: Published, name: str | None) -> list[dict[str, Any]]:
    """The earlier turns, stored as pairs of question and answer next to the prompt."""
    if name == "history" or not isinstance(row.values.get("history"), list):
        return []
    before = []
    for pair in listed(row, "history", row.get("history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.wrong("history", pair, "pairs of a question and its answer")
        before += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return before
