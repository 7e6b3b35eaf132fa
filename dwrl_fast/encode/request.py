"""Requests for thoughts, and the groups that are made from requests and thoughts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Context, Dialog, SingleTurn
from dwrl_fast.encode.comparisons import Comparison
from dwrl_fast.encode.group import Group
from dwrl_fast.encode.thought import Thought

Verdict = TypeVar("Verdict")


@dataclass(frozen=True, slots=True)
class Request:
    """The contexts of one preference: one for each of its responses, or for each of `comparisons`."""

    preference: Preference
    contexts: list[Context]
    comparisons: list[Comparison] = field(default_factory=list)


def response_requests(rows: Sequence[Preference], dialog: Dialog | SingleTurn) -> list[Request]:
    """One request per row, with each of its responses shown alone."""
    if isinstance(dialog, Dialog):
        return [Request(row, [dialog.context(row.prompt, one, row.aspect) for one in row.responses]) for row in rows]
    return [Request(row, [dialog.context(row.prompt, [one], row.aspect) for one in row.responses]) for row in rows]


def comparison_requests(
    rows: Sequence[Preference],
    comparisons: Sequence[Sequence[Comparison]],
    dialog: SingleTurn,
    *,
    tell_verdict: bool = False,
) -> list[Request]:
    """One request per row that has comparisons; each comparison shows both responses together. tell_verdict: the
    question contains the right verdict, for templates of kind rationalizer.
    """
    return [
        Request(
            row,
            [
                dialog.context(
                    row.prompt,
                    [row.responses[k] for k in each.places],
                    row.aspect,
                    "AB"[each.right or 0] if tell_verdict else None,
                )
                for each in some
            ],
            list(some),
        )
        for row, some in zip(rows, comparisons, strict=True)
        if some
    ]


def closed_groups(
    requests: Sequence[Request], thoughts: Sequence[Sequence[Thought]], dialog: Dialog | SingleTurn
) -> list[Group]:
    """One group per request: each context is completed by each of its thoughts. thoughts: a list for each context,
    request after request.
    """
    left = iter(thoughts)
    groups = []
    for request in requests:
        found = [list(next(left)) for _ in request.contexts]
        sequences = [
            [dialog.sequence(context, thought.ids) for thought in some]
            for context, some in zip(request.contexts, found, strict=True)
        ]
        groups.append(Group(request.preference, sequences, found))
    return groups


def label_groups(requests: Sequence[Request], dialog: Dialog | SingleTurn) -> list[Group]:
    """One group per request, with a sequence for each context and without thoughts. A label or a score is read at the
    end of each sequence.
    """
    return [
        Group(request.preference, [[dialog.sequence(context, [])] for context in request.contexts])
        for request in requests
    ]


def read_thoughts(
    group: Group, dialog: Dialog | SingleTurn, read: Callable[[str], Verdict | None]
) -> list[list[Verdict | None]]:
    """The result of `read` for the text of each thought: K lists of N; None if it finds no verdict."""
    decode = dialog.tokenizer.decode
    return [
        [read(decode(sequence.ids[sequence.thought], skip_special_tokens=False)) for sequence in sequences]
        for sequences in group.sequences
    ]
