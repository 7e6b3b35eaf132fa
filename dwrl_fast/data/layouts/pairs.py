"""Layouts of pairs, with separate columns for the better and the worse answer."""

from typing import Any

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.formats import BINARY, BINARYMAGN
from dwrl_fast.data.layouts.layout import OURS, Layout, Published, Values, any_values, found, listed, number
from dwrl_fast.data.layouts.prompts import MESSAGES, PROMPT, SYSTEM, content, prompt
from dwrl_fast.data.messages import is_message, role_of
from dwrl_fast.data.remarks import CONTRADICTED
from dwrl_fast.data.table_text import is_transcript, parsed

CHOSEN = "chosen|chosen_response|preferred_output|preferred|response_j"
REJECTED = "rejected|rejected_response|reject|non_preferred_output|dispreferred|response_k"
REJECTED_TURN = "rejected_response|rejected_messages|rejected"
SCORES = tuple(
    (chosen, chosen.replace("chosen", "rejected"))
    for chosen in (
        "score_chosen", "chosen_score", "chosen-rating", "chosen_rating", "rating_chosen", "chosen_avg_rating",
        "chosen_reward", "reward_chosen",
    )
)  # fmt: skip


def pair(row: Published) -> dict[str, Any]:
    """A row with chosen and rejected."""
    sides = {"chosen": content(row.take(CHOSEN)), "rejected": content(row.take(REJECTED))}
    if is_transcript(row.values.get("prompt")):  # a space separates its last heading from the answer
        sides = {name: side.strip() if isinstance(side, str) else side for name, side in sides.items()}
    return _prompt(row) | sides | _margin(row) | ours(row)


def answered(row: Published) -> dict[str, Any]:
    """A conversation that ends with the better answer, and a column with the worse answer, alone or as a
    conversation.
    """
    turns = content(row.take(MESSAGES))
    if not isinstance(turns, list) or not turns:
        raise row.wrong(row.name(MESSAGES) or "messages", turns, "a list of messages")
    worse = content(row.take(REJECTED_TURN))
    whole = isinstance(worse, list) and len(worse) > 1  # the reader then compares both conversations
    asked, answer = (turns[:0], turns) if whole else (turns[:-1], turns[-1:])
    return {"prompt": [*_system(row, turns), *asked], "chosen": answer, "rejected": worse} | ours(row)


def _system(row: Published, turns: list[Any]) -> list[dict[str, Any]]:
    """The turns with the system prompt from its column, unless the conversation begins with one."""
    value = row.get(SYSTEM)
    return [{"role": "system", "content": value}] if value and role_of(turns[0]) != "system" else []


def listed_pair(row: Published) -> dict[str, Any]:
    """An instruction with a list of two answers, the better one first."""
    answers = listed(row, "output", row.take("output"))
    if len(answers) != 2:
        raise Unusable(f"{len(answers)} answers, but a pair has two")
    return prompt(row) | {"chosen": content(answers[0]), "rejected": content(answers[1])} | ours(row)


def ours(row: Published) -> dict[str, Any]:
    """The columns of this package that a row of any layout may have. A null is left out."""
    values = {name: row.get(name) for name in OURS}
    return {name: value for name, value in values.items() if value is not None}


def _prompt(row: Published) -> dict[str, Any]:
    asked = parsed(row.values.get("input"))
    if isinstance(asked, dict) and "messages" in asked:
        row.read.add("input")
        return {"prompt": content(asked["messages"])}
    return prompt(row)


def _margin(row: Published) -> dict[str, Any]:
    for names in SCORES:
        if not all(name in row.values for name in names):
            continue
        better, worse = (number(row, name, row.get(name)) for name in names)
        if row.name("margin|magnitude") or better is None or worse is None:
            return {}
        if better < worse:
            row.notes[CONTRADICTED] += 1
            return {}
        return {"margin": better - worse}
    return {}


def _values(values: Values) -> list[Any]:
    names = (found(values, each) for each in (PROMPT, CHOSEN, REJECTED))
    return [values[name] for name in names if name is not None]


def _answers(values: Values) -> bool:
    """Whether no answer column holds a list of several texts."""
    return not any(isinstance(value, list) and value and isinstance(value[0], str) for value in _values(values)[-2:])


def _messages(values: Values) -> list[Any]:
    return [each for value in _values(values) for each in (value if isinstance(value, list) else [value])]


def _from_value(values: Values) -> bool:
    return any(isinstance(each, dict) and {"from", "value"} <= each.keys() for each in _messages(values))


def _single(values: Values) -> bool:
    return any(is_message(value) and "role" in value for value in _values(values))


def _parts(values: Values) -> bool:
    return any(is_message(each) and isinstance(each.get("content"), list) for each in _messages(values))


def _transcripts(values: Values) -> bool:
    return any(is_transcript(value) for value in _values(values))


def _asked_in_messages(values: Values) -> bool:
    """Whether the messages are a prompt, not a copy of the conversation with an answer."""
    name = found(values, MESSAGES)
    said = values[name] if name else None
    asked = isinstance(said, list) and bool(said) and role_of(said[-1]) == "user"
    return asked and not _from_value(values) and not found(values, "prompt|question|instruction|query")


def _answered(values: Values) -> bool:
    """Whether the messages end with an answer."""
    name = found(values, MESSAGES)
    said = parsed(values[name]) if name else None
    return isinstance(said, list) and bool(said) and role_of(said[-1]) == "assistant" and not found(values, CHOSEN)


def _layout(name: str, title: str, columns: str, becomes: str, **more: Any) -> Layout:
    told = more.pop("when", any_values)
    return Layout(
        name, title, columns, becomes, pair, BINARY,
        when=lambda values: _answers(values) and told(values), over=(BINARY, BINARYMAGN), **more
    )  # fmt: skip


TWO = f"{CHOSEN} {REJECTED}"
OTHER_NAMES = "chosen_response|preferred|response_j rejected_response|reject|dispreferred|response_k"
NAMED = "question|query|user_prompt|context|history|post|input"
PAIRS = (
    _layout(
        "sharegpt", "ShareGPT pairs", TWO,
        "`conversations` (or any prompt) and the answers, of `from` and `value`: human is the user, gpt the assistant",
        when=_from_value, lost="other fields of a message",
    ),
    _layout(
        "single_messages", "pairs of single messages", TWO,
        "an answer (or prompt) that is one object with `role` and `content`: a conversation of one turn",
        when=_single, lost="other fields of a message",
    ),
    _layout(
        "content_parts", "pairs whose content is in parts", TWO,
        "`content` as a list of `{type: text, text}`: their texts, joined", when=_parts,
        lost="parts that are no text: the row is dropped",
    ),
    _layout(
        "messages", "messages with two answers", f"{MESSAGES} {TWO}",
        "`messages` is the prompt, unless the row has a `prompt`",
        when=_asked_in_messages,
    ),
    _layout(
        "openai", "preference data of OpenAI", "input preferred_output non_preferred_output",
        "`input.messages` is the prompt, `preferred_output` is chosen", lost="`input.tools`",
    ),
    _layout(
        "alpaca", "Alpaca pairs", f"instruction {TWO}",
        "`instruction`, a new line and `input` (if it is not empty) are the prompt; `history` is the turns before it",
        when=lambda values: "prompt" not in values,
    ),
    _layout(
        "system", "pairs with a system prompt", f"{SYSTEM} {TWO}",
        "`system` becomes the system turn, unless it is empty",
    ),
    _layout(
        "named_prompt", "pairs whose prompt has another name", f"{NAMED} {TWO}",
        "the first of these columns in the row becomes the prompt",
        when=lambda values: not any(name in values for name in ("prompt", "instruction"))
        and found(values, PROMPT) is not None,
    ),
    _layout(
        "named_answers", "pairs whose answers have other names",
        OTHER_NAMES, "they become chosen and rejected",
    ),
    _layout(
        "transcripts", "Human/Assistant transcripts", TWO,
        "texts with turns headed `Human:` and `Assistant:` become turns, in answers and prompt", when=_transcripts,
    ),
    _layout(
        "margins", "pairs with scores as margins", TWO,
        "`score_chosen` minus `score_rejected` (also `chosen-rating`, `chosen_avg_rating`, ...) is the margin, "
        "unless the row has a `margin`",
        when=lambda values: any(all(name in values for name in names) for names in SCORES),
        lost="scores that contradict the order, which are counted",
    ),
)  # fmt: skip
LISTED = (
    Layout(
        "answered", "conversations with a separate worse answer", f"{MESSAGES} {REJECTED_TURN}",
        "the last turn of `messages` is chosen, those before it are the prompt; `rejected_response` (or "
        "`rejected_messages`) is rejected", answered, BINARY, when=_answered,
    ),
    Layout(
        "alpaca_list", "Alpaca rows with a list of two answers", "instruction output",
        "`output` holds the better and the worse answer; the prompt is as of alpaca", listed_pair, BINARY,
        when=lambda values: isinstance(values["output"], list)
        or (isinstance(values["output"], str) and values["output"].startswith("[") and "chosen" not in values),
    ),
)  # fmt: skip
