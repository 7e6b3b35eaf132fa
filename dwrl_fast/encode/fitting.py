"""Selects the rows whose sequences are not too long and that the chat template can represent."""

from collections.abc import Callable
from itertools import permutations

from dwrl_fast.data import Dataset, Demonstration, Preference
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode.demonstrations import demonstration_group
from dwrl_fast.errors import DataError, OverrunError, TemplateError


def drop_long(dataset: Dataset, dialog: Dialog | SingleTurn, max_length: int, progress: Callable[[int], None]) -> int:
    """Drop and count the groups that `fit` rejects; none is truncated. Returns the tokens of the longest remaining
    sequence, with an empty thought.
    """
    unused: list[tuple[Preference, str]] = []
    longest = 0
    for row in dataset.rows:
        progress(1)
        tokens, reason = fit(row, dialog, max_length)
        longest = max(longest, tokens)
        if reason:
            unused.append((row, reason))
    dataset.leave_out(unused)
    if not dataset.rows:
        raise DataError(f"{dataset.summary}. Nothing is left: raise --max_length, or see the reasons above")
    return longest


def fit(row: Preference, dialog: Dialog | SingleTurn, max_length: int) -> tuple[int, str]:
    """The tokens of a group's longest sequence, with an empty thought, and ""; or 0 and the reason to drop the group.

    It is where prompt and longest response, or what is shown together, or a whole demonstration, have more than
    `max_length` tokens, or the chat template cannot carry them. OverrunError, with the row, where the chat template
    takes too much for them.
    """
    try:
        if isinstance(row, Demonstration):
            size = demonstration_group(row, dialog).longest
            return (0, f"longer than --max_length {max_length} tokens") if size > max_length else (size, "")
        if not isinstance(dialog, Dialog) and len(row.responses) < len(dialog.shows):  # to imitate, not to judge
            completion = dialog.completion(row.prompt, row.responses[0])
            long = completion.response.stop > max_length
            return (0, f"longer than --max_length {max_length} tokens") if long else (len(completion.ids), "")
        if isinstance(dialog, Dialog):
            contexts = [dialog.context(row.prompt, response, row.aspect) for response in row.responses]
        else:
            shown = permutations(row.responses, len(dialog.shows))
            contexts = [dialog.context(row.prompt, some, row.aspect) for some in shown]
    except OverrunError as error:
        raise OverrunError(f"{row.source}: {error}") from error
    except TemplateError as error:
        return 0, str(error)
    if max((context.second or context.response).stop for context in contexts) > max_length:
        return 0, f"longer than --max_length {max_length} tokens"
    return max(len(dialog.sequence(context, []).ids) for context in contexts), ""
