"""Responses one by one: the contexts that their thoughts are sampled for, and the groups that hold them."""

from collections.abc import Sequence

import torch

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Context, Dialog, SingleTurn
from dwrl_fast.encode.group import Group
from dwrl_fast.encode.thought import Thought


def response_contexts(rows: Sequence[Preference], dialog: Dialog | SingleTurn) -> list[list[Context]]:
    """The context of each of a row's responses, shown alone."""
    if isinstance(dialog, Dialog):
        return [[dialog.context(row.prompt, response, row.aspect) for response in row.responses] for row in rows]
    return [[dialog.context(row.prompt, [response], row.aspect) for response in row.responses] for row in rows]


def closed_groups(
    rows: Sequence[Preference],
    contexts: Sequence[Sequence[Context]],
    thoughts: Sequence[Sequence[Thought]],
    dialog: Dialog | SingleTurn,
) -> list[Group]:
    """One group a row, each of its contexts closed by each of the thoughts about it. thoughts: a list for each context,
    row after row; old_logprobs are theirs.
    """
    left = iter(thoughts)
    groups = []
    for row, of_row in zip(rows, contexts, strict=True):
        found = [next(left) for _ in of_row]
        groups.append(
            Group(
                preference=row,
                sequences=[
                    [dialog.sequence(context, thought.ids) for thought in some]
                    for context, some in zip(of_row, found, strict=True)
                ],
                old_logprobs=[[torch.tensor(thought.logprobs) for thought in some] for some in found],
                ended=[[thought.ended for thought in some] for some in found],
            )
        )
    return groups


def plain_groups(rows: Sequence[Preference], dialog: Dialog) -> list[Group]:
    """One group a preference, K responses as they stand, nothing sampled: what a scalar model reads."""
    return [Group(row, [[dialog.plain(row.prompt, response)] for response in row.responses]) for row in rows]


def completion_groups(rows: Sequence[Preference], dialog: Dialog | SingleTurn) -> list[Group]:
    """The same with each response as what is trained: what a policy writes."""
    return [Group(row, [[dialog.completion(row.prompt, response)] for response in row.responses]) for row in rows]
