"""What thoughts are sampled for, and the groups that thoughts and requests become."""

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
    """What is asked about one preference: a context for each of its responses, or for each of `comparisons`."""

    preference: Preference
    contexts: list[Context]
    comparisons: list[Comparison] = field(default_factory=list)


def response_requests(rows: Sequence[Preference], dialog: Dialog | SingleTurn) -> list[Request]:
    """One request a row: each of its responses, shown alone."""
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
    """One request a row: its comparisons, both responses shown together; none for a row without any. tell_verdict: the
    question holds the right one, for templates of kind rationalizer.
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
    """One group a request, each of its contexts closed by each of the thoughts about it. thoughts: a list for each
    context, request after request.
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
    """One group a request with a sequence for each context, at whose end a label or a score is read; no thought."""
    return [
        Group(request.preference, [[dialog.sequence(context, [])] for context in request.contexts])
        for request in requests
    ]


def read_thoughts(
    group: Group, dialog: Dialog | SingleTurn, read: Callable[[str], Verdict | None]
) -> list[list[Verdict | None]]:
    """What `read` finds in the text of each thought: K lists of N; None where it finds no verdict."""
    decode = dialog.tokenizer.decode
    return [
        [read(decode(sequence.ids[sequence.thought], skip_special_tokens=False)) for sequence in sequences]
        for sequences in group.sequences
    ]
