"""One layout that data are published in: how it is told, what maps to what, what it cannot carry."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dwrl_fast.data.columns import SHORT, nearest, quoted
from dwrl_fast.data.formats import Format
from dwrl_fast.data.table_text import parsed
from dwrl_fast.errors import DataError

OURS = ("margin", "magnitude", "aspect", "subset", "id")  # of any layout: passed on as they are

Values = Mapping[str, Any]


@dataclass
class Published:
    """One row as it is published. `read` has the columns that were asked for; what is in none of them was not read.

    A column is asked for by the names it may have, with | between them: "prompt|question". aspect: what to judge, where
    the layout has scores by aspect. notes: as those of the Dataset.
    """

    values: Values
    source: str
    title: str
    aspect: str | None = None
    read: set[str] = field(default_factory=set)
    notes: Counter[str] = field(default_factory=Counter)

    def name(self, names: str) -> str | None:
        """The first of the names that the row has a value for."""
        return found(self.values, names)

    def get(self, names: str, default: Any = None) -> Any:
        """A column's value; `default` where none of the names has one."""
        name = self.name(names)
        if name is None:
            self.read.update(set(names.split("|")) & self.values.keys())
            return default
        self.read.add(name)
        return self.values[name]

    def take(self, names: str) -> Any:
        """A column that must be there, be it null. DataError."""
        name = self.name(names) or next((each for each in names.split("|") if each in self.values), None)
        if name is None:
            first = names.split("|")[0]
            near = nearest(first, self.values) or "NAME"
            raise DataError(
                f"{self.source}: no column '{first}' among {quoted(self.values)}; the rows are read as {self.title}. "
                f"Name it with --columns {first}={near}, or name another --layout"
            )
        self.read.add(name)
        return self.values[name]

    def wrong(self, name: str, value: Any, wanted: str) -> DataError:
        """That `value`, of column `name`, is none that the layout has."""
        kind = type(value).__name__
        return DataError(
            f"{self.source}: '{name}' should hold {wanted}, not the {kind} {SHORT.repr(value)[:60]}; the rows are read "
            f"as {self.title}"
        )


def any_values(values: Values) -> bool:
    """Whatever the values are."""
    return True


Convert = Callable[[Published], dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """name: for --layout. title: completes "read as". columns: how it is told: each of these words is a column, by one
    of its names; `when` is asked about the values too. becomes: what maps to what. lost: what cannot be carried.

    convert: a row of it as a row of ours, of `form`. Layouts of one convert go together. over: formats of ours whose
    columns it has too, and which are not meant then.
    """

    name: str
    title: str
    columns: str
    becomes: str
    convert: Convert
    form: Format
    lost: str = "-"
    when: Callable[[Values], bool] = any_values
    over: tuple[Format, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its name, for another process."""
        from dwrl_fast.data.layouts import layout_of

        return layout_of, (self.name,)

    def tells(self, values: Values) -> bool:
        """Whether a row is of it."""
        return all(any(name in values for name in names.split("|")) for names in self.columns.split()) and self.when(
            values
        )

    @property
    def names(self) -> set[str]:
        """Its columns, by all their names."""
        return {name for names in self.columns.split() for name in names.split("|")}


def found(values: Values, names: str) -> str | None:
    """The first of the names, with | between them, that `values` has a value for."""
    return next((name for name in names.split("|") if values.get(name) is not None), None)


def number(row: Published, name: str, value: Any) -> float | None:
    """A number, also one that is written as text; None for a null. DataError."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "none", "null")):
        return None
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise row.wrong(name, value, "a number")


def listed(row: Published, name: str, value: Any) -> list[Any]:
    """A list. DataError."""
    value = parsed(value)
    if not isinstance(value, list):
        raise row.wrong(name, value, "a list")
    return value
