"""BINARY: a row with `prompt`, `chosen` and `rejected`, and optionally a `margin`, or `tie` if neither is better.

BINARYMAGN: the same with a `magnitude` instead.

Values are strings or message lists. The prompt may also be part of both message lists.
"""

from dwrl_fast.data.columns import Columns, Unusable, conversation, differing_fields
from dwrl_fast.data.preference import Preference, Ties
from dwrl_fast.data.table_text import Cell, truth

MAGNITUDES = (0, 1, 2)


def pair(row: Columns, ties: Ties) -> Preference:
    """The preference in one row. Raises DataError or Unusable."""
    margin = row.number("margin", default=0.0)
    tie = row.column("tie", default=None)
    tied = truth(tie) if isinstance(tie, bool | Cell) else None
    if tie is not None and tied is None:
        raise row.mistyped("tie", tie, "true or false")
    if not tied:
        return _pair(row, margin)
    if ties == "drop":
        raise Unusable("tie (--ties keep would use it)")
    return _pair(row, 0.0, ranks=(1, 1))


def pair_with_magnitude(row: Columns, ties: Ties) -> Preference:
    """The preference in one row, its magnitude (0: neutral, 1, 2) as margin. Raises DataError or Unusable."""
    magnitude = row.number("magnitude")
    if magnitude not in MAGNITUDES:
        raise Unusable("magnitude is not 0, 1 or 2")
    if magnitude == 0 and ties == "drop":
        raise Unusable("neutral: magnitude 0 (--ties keep would use it)")
    return _pair(row, magnitude, ranks=() if magnitude else (1, 1))


def _pair(row: Columns, margin: float, ranks: tuple[int, ...] = ()) -> Preference:
    chosen, rejected = row.turns("chosen", "assistant"), row.turns("rejected", "assistant")
    prompt = row.prompt([row.column("chosen")])
    turns, responses = conversation(prompt, [chosen, rejected])
    if responses[0].strip() == responses[1].strip():
        fields = differing_fields(row.column("chosen"), row.column("rejected"))
        raise Unusable("identical responses" + (f": they differ only in {fields}, which is not read" if fields else ""))
    return row.preference(turns, responses, margin=margin, ranks=ranks)
