"""Recognises the format of rows from their column names."""

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dwrl_fast.data.columns import nearest, quoted
from dwrl_fast.errors import DataError


@dataclass(frozen=True)
class Format:
    """One format of rows. needs: a row has this format if it has one of these sets of columns. hints: columns that only
    this format has.
    """

    name: str
    needs: tuple[frozenset[str], ...]
    columns: frozenset[str]
    hints: frozenset[str] = frozenset()

    def __reduce__(self) -> str:
        """Pickle as the name of a constant of this module, so that another process gets the same object."""
        return self.name


def _format(name: str, needs: list[str], optional: str, hints: str = "") -> Format:
    sets = tuple(frozenset(words.split()) for words in needs)
    columns = frozenset().union(*sets, optional.split(), ["aspect", "subset", "id"])
    return Format(name, sets, columns, frozenset(hints.split()))


BINARY = _format("BINARY", ["chosen rejected"], "prompt margin tie", hints="chosen rejected")
BINARYMAGN = _format("BINARYMAGN", ["chosen rejected magnitude"], "prompt")
RANKING = _format(
    "RANKING", ["completions", "responses ranks", "responses scores"], "prompt context", hints="responses ranks"
)
SINGLE = _format("SINGLE", ["completion score"], "prompt", hints="completion score")
DEMONSTRATION = _format("DEMONSTRATION", ["response thought", "responses thought"], "prompt verdict", hints="thought")
FORMATS = (BINARYMAGN, BINARY, RANKING, SINGLE, DEMONSTRATION)  # if several formats fit, the first one counts
COLUMNS = tuple(sorted(frozenset().union(*(form.columns for form in FORMATS))))


@functools.lru_cache(maxsize=256)
def recognise(keys: tuple[str, ...], mapping: tuple[tuple[str, str], ...]) -> Format | None:
    """The format of rows with these columns; None if there is none. mapping: pairs (our name, name in the file)."""
    names = {*keys, *(ours for ours, theirs in mapping if theirs in keys)}
    for form in FORMATS:
        # An explicit margin has priority; a magnitude in such a row means something else.
        if any(needs <= names for needs in form.needs) and not (form is BINARYMAGN and "margin" in names):
            return form
    return None


def guess(keys: Iterable[str], mapping: Mapping[str, str]) -> Format | None:
    """The probable format of rows that lack a column."""
    return next((form for form in FORMATS if form.hints & {*keys, *mapping}), None)


def check_mapping(mapping: Mapping[str, str], others: Collection[str] = ()) -> None:
    """Raises DataError if a name is neither a column of any format nor one of `others`, or if one column has two
    roles.
    """
    for name, theirs in mapping.items():
        if twice := [each for each in mapping if mapping[each] == theirs and each != name]:
            raise DataError(
                f"--columns {name}={theirs}: the column '{theirs}' is already mapped to '{twice[0]}'; map one of the "
                "two to another column"
            )
        if name not in COLUMNS and name not in others:
            near = nearest(name, COLUMNS)
            hint = f"did you mean {near!r}" if near else f"there are {', '.join(COLUMNS)}"
            raise DataError(f"--columns {name}={mapping[name]}: there is no column {name!r} to fill; {hint}")


def check_first(form: Format, values: Mapping[str, object], mapping: Mapping[str, str], source: str) -> None:
    """Raises DataError if a mapped column is missing, or does not belong to the format."""
    for ours, theirs in mapping.items():
        if theirs not in mapping and any(theirs in needs for needs in form.needs) and ours not in values:
            raise DataError(
                f"{source}: --columns {ours}={theirs}: '{theirs}' is a column of {form.name}, the format of these "
                f"rows; name its source with --columns {theirs}=NAME, or map another column to '{ours}'"
            )
        if theirs not in values:
            near = nearest(theirs, values) or "NAME"
            raise DataError(
                f"{source}: no column '{theirs}' among {quoted(values)}; name it with --columns {ours}={near}"
            )
        if ours not in form.columns:
            raise DataError(
                f"{source}: the rows are {form.name}, which has no '{ours}'; leave --columns {ours}={theirs} out"
            )


def unrecognised(values: Mapping[str, object], source: str) -> DataError:
    """The error for columns that match no format; it names the columns that would."""
    wanted = "; or ".join(
        " and ".join(sorted(needs)) for form in FORMATS if form is not BINARYMAGN for needs in form.needs
    )
    return DataError(
        f"{source}: the columns {quoted(values)} match no format. The formats need {wanted}. If the columns have "
        "other names, map them: --columns chosen=THEIR_NAME. If the file has a layout that `python -m dwrl_fast.data "
        "--formats` lists, name it with --layout"
    )
