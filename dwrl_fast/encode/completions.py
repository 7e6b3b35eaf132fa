"""Responses without any question about them."""

from collections.abc import Sequence

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode.group import Group


def plain_groups(rows: Sequence[Preference], dialog: Dialog) -> list[Group]:
    """One group per preference, with a sequence for each response, as input of a scalar model."""
    return [Group(row, [[dialog.plain(row.prompt, response)] for response in row.responses]) for row in rows]


def completion_groups(rows: Sequence[Preference], dialog: Dialog | SingleTurn) -> list[Group]:
    """The same, with the tokens of each response marked as trained: for a policy."""
    return [Group(row, [[dialog.completion(row.prompt, response)] for response in row.responses]) for row in rows]
