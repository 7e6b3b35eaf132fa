"""One layout of published data: how it is recognised, what its columns become, and what is lost."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dwrl_fast.data.columns import SHORT, nearest, quoted
from dwrl_fast.data.formats import Format
from dwrl_fast.data.table_text import parsed
from dwrl_fast.errors import DataError

OURS = ("margin", "magnitude", "tie", "aspect", "subset", "id")  # copied unchanged, for the formats that read them

Values = Mapping[str, Any]


@dataclass
class Published:
    """One row in its published form. `read` collects the columns that were read.

    A column is requested by its possible names, separated by |: "prompt|question". aspect: the aspect to judge, of rows
    without a column of that name. notes: as in Dataset. aspects: those that the row has scores of. scored_by: the one
    whose scores were read.
    """

    values: Values
    source: str
    title: str
    aspect: str | None = None
    read: set[str] = field(default_factory=set)
    notes: Counter[str] = field(default_factory=Counter)
    aspects: tuple[str, ...] = ()
    scored_by: str | None = None

    @property
    def asked(self) -> str | None:
        """The aspect that the row is judged by; None if nothing names one."""
        own = self.values.get("aspect")
        return own if isinstance(own, str) and own.strip() else self.aspect

    def name(self, names: str) -> str | None:
        """The first of the names that the row has a value for."""
        return found(self.values, names)

    def get(self, names: str, default: Any = None) -> Any:
        """A column's value; `default` if none of the names has a value."""
        name = self.name(names)
        if name is None:
            self.read.update(set(names.split("|")) & self.values.keys())
            return default
        self.read.add(name)
        return self.values[name]

    def take(self, names: str) -> Any:
        """The value of a required column, possibly null. Raises DataError if it is missing."""
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
        """The error for a `value` of column `name` that the layout does not know."""
        kind = type(value).__name__
        return DataError(
            f"{self.source}: '{name}' should hold {wanted}, not the {kind} {SHORT.repr(value)[:60]}; the rows are read "
            f"as {self.title}"
        )


def any_values(values: Values) -> bool:
    """Accepts any values."""
    return True


Convert = Callable[[Published], dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """name: the value of --layout. title: completes "read as". columns: the columns that identify it, separated by
    spaces, each with its possible names; `when` also tests the values. becomes: what the columns become. lost: what
    cannot be represented.

    convert: converts a row to the format `form`. Layouts with the same `convert` can be combined. over: formats whose
    columns also match; the layout has priority over them.
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
        """Pickle by name, for other processes."""
        from dwrl_fast.data.layouts import layout_of

        return layout_of, (self.name,)

    def tells(self, values: Values) -> bool:
        """Whether a row has this layout."""
        return all(any(name in values for name in names.split("|")) for names in self.columns.split()) and self.when(
            values
        )

    @property
    def names(self) -> set[str]:
        """All possible names of its columns."""
        return {name for names in self.columns.split() for name in names.split("|")}


def found(values: Values, names: str) -> str | None:
    """The first of the names (separated by |) that has a value in `values`."""
    return next((name for name in names.split("|") if values.get(name) is not None), None)


def named(names: Iterable[str], aspect: str | None) -> str | None:
    """The one of the names that is the aspect. Case, spaces and hyphens do not count: an aspect is also a part of a
    question, such as "instruction following".
    """
    return None if aspect is None else next((name for name in names if _spelled(name) == _spelled(aspect)), None)


def _spelled(aspect: str) -> str:
    return aspect.strip().casefold().replace(" ", "_").replace("-", "_")


def number(row: Published, name: str, value: Any) -> float | None:
    """A number, also one written as text; None for a null. Raises DataError for anything else."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "none", "null")):
        return None
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise row.wrong(name, value, "a number")


def listed(row: Published, name: str, value: Any) -> list[Any]:
    """A list. Raises DataError for anything else."""
    value = parsed(value)
    if not isinstance(value, list):
        raise row.wrong(name, value, "a list")
    return value
