"""Responses as they stand, with nothing asked about them."""

from collections.abc import Sequence

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode.group import Group


def plain_groups(rows: Sequence[Preference], dialog: Dialog) -> list[Group]:
    """One group a preference, a sequence for each response: what a scalar model reads."""
    return [Group(row, [[dialog.plain(row.prompt, response)] for response in row.responses]) for row in rows]


def completion_groups(rows: Sequence[Preference], dialog: Dialog | SingleTurn) -> list[Group]:
    """The same with each response as what is trained: what a policy writes."""
    return [Group(row, [[dialog.completion(row.prompt, response)] for response in row.responses]) for row in rows]
