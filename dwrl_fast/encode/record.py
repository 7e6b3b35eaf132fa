"""Groups as JSON and back. A checkpoint stores the current rollout batch this way."""

import dataclasses
import math
from typing import Any

from dwrl_fast.data import Demonstration, Preference
from dwrl_fast.data.jsonl import finite
from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode.group import Group
from dwrl_fast.encode.thought import Thought

KINDS = {kind.__name__: kind for kind in (Preference, Demonstration)}
SPANS = ("prompt", "response", "thought", "rate")


def group_record(group: Group) -> dict[str, Any]:
    """`group` as a JSON value. A log-prob that is not finite becomes null, and nan when it is read."""
    row = group.preference
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    lists = {name: list(values[name]) for name in ("prompt", "responses", "ranks")}
    return {
        "kind": type(row).__name__,
        "row": values | lists,
        "sequences": [[_sequence_record(one) for one in some] for some in group.sequences],
        "thoughts": [[_thought_record(one) for one in some] for some in group.thoughts],
        "labels": list(group.labels),
    }


def group_of(record: dict[str, Any]) -> Group:
    """The group that `group_record` wrote. Raises LookupError, TypeError or ValueError if `record` is not one."""
    row = record["row"]
    tuples = {name: tuple(row[name]) for name in ("prompt", "responses", "ranks")}
    return Group(
        KINDS[record["kind"]](**row | tuples),
        [[_sequence(one) for one in some] for some in record["sequences"]],
        [[_thought(one) for one in some] for some in record["thoughts"]],
        record["labels"],
    )


def _thought_record(one: Thought) -> dict[str, Any]:
    values = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return values | {"logprobs": finite(one.logprobs), "score": finite(one.score)}


def _thought(record: dict[str, Any]) -> Thought:
    logprobs = [math.nan if value is None else value for value in record["logprobs"]]
    return Thought(**record | {"logprobs": logprobs})


def _sequence_record(one: TokenSequence) -> dict[str, Any]:
    spans = {name: getattr(one, name) for name in SPANS}
    return {"ids": list(one.ids)} | {name: [span.start, span.stop] for name, span in spans.items()}


def _sequence(record: dict[str, Any]) -> TokenSequence:
    return TokenSequence(record["ids"], **{name: slice(*record[name]) for name in SPANS})
