"""The layouts of public preference data, and the detection of a file's layout. The reader itself knows no layout.

A layout converts a row to one of this package's formats. The converted row is then checked like any other row.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dwrl_fast.data.columns import quoted
from dwrl_fast.data.formats import BINARYMAGN, Format, recognise
from dwrl_fast.data.layouts.layout import Layout, Published
from dwrl_fast.data.layouts.many import MANY
from dwrl_fast.data.layouts.pairs import LISTED, PAIRS
from dwrl_fast.data.layouts.verdicts import VERDICTS
from dwrl_fast.data.remarks import EMPTY
from dwrl_fast.errors import DataError

__all__ = [
    "LAYOUTS",
    "PLAIN",
    "Chosen",
    "Published",
    "asked_for",
    "choose",
    "layout_of",
    "layout_table",
    "names_of",
    "renamed",
]

LAYOUTS: tuple[Layout, ...] = (*PAIRS, *LISTED, *VERDICTS, *MANY)
PLAIN = "plain"  # this package's own formats, without conversion


@dataclass(frozen=True)
class Chosen:
    """The layouts of a file; all share one convert function."""

    layouts: tuple[Layout, ...]

    @property
    def title(self) -> str:
        """The text after "read as"."""
        return " + ".join(layout.title for layout in self.layouts)

    @property
    def names(self) -> str:
        """The value of `--layout` for them."""
        return "+".join(layout.name for layout in self.layouts)

    @property
    def form(self) -> Format:
        """The format of the converted rows."""
        return self.layouts[0].form

    def row(
        self, values: Mapping[str, Any], source: str, aspect: str | None, mapping: Mapping[str, str], *, first: bool
    ) -> tuple[Format, dict[str, Any], Published]:
        """The format and the values that a published row is converted to, and the record of the columns that were read.
        Raises DataError or Unusable. mapping: our name -> name in the file.

        first: no row was converted before. Raises DataError then also if a mapped column is missing or was not read.
        """
        published = Published(renamed(values, mapping), source, self.title, aspect)
        for name, theirs in mapping.items() if first else ():
            if theirs not in values:
                raise self._unfit(published, name, theirs, f"no column '{theirs}' among {quoted(values)}")
        converted = self.layouts[0].convert(published)
        form = BINARYMAGN if recognise(tuple(converted), ()) is BINARYMAGN else self.form  # layouts of pairs allow both
        published.read -= converted.keys() - form.columns
        for name, theirs in mapping.items() if first else ():
            if values[theirs] not in EMPTY and name not in published.read:
                raise self._unfit(published, name, theirs, f"no '{name}' is read")
        return form, converted, published

    def _unfit(self, row: Published, name: str, theirs: str, wrong: str) -> DataError:
        return DataError(
            f"{row.source}: --columns {name}={theirs}: {wrong}; the rows are read as {self.title}. Correct the option "
            "or leave it out"
        )


def choose(values: Mapping[str, Any], source: str) -> Chosen | None:
    """The layout of a file that contains this row; None if the row has one of this package's formats or no known
    layout. Raises DataError if several layouts fit.
    """
    told = [layout for layout in LAYOUTS if layout.tells(values)]
    converts = list(dict.fromkeys(layout.convert for layout in told))
    form = recognise(tuple(values), ())
    plain = form if form is not None and not any(form in layout.over for layout in told) else None
    if len(converts) + (plain is not None) > 1:
        candidates = [f"{PLAIN} ({plain.name})"] if plain else []
        candidates += [f"{layout.name} ({layout.title})" for layout in told]
        raise DataError(
            f"{source}: the rows can be read in several ways; choose one with --layout NAME: {', '.join(candidates)}"
        )
    return Chosen(tuple(told)) if told else None


def renamed(values: Mapping[str, Any], mapping: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with columns renamed by `mapping` (our name -> name in the file)."""
    if not mapping:
        return values
    theirs = {name: key for key, name in mapping.items()}
    kept = {name: value for name, value in values.items() if name not in theirs and name not in mapping}
    return kept | {key: values[name] for key, name in mapping.items() if name in values}


def layout_of(name: str) -> Layout:
    """The layout with this name. Raises DataError if there is none."""
    named = {layout.name: layout for layout in LAYOUTS}
    if name not in named:
        near = difflib.get_close_matches(name, [PLAIN, *named], n=1)
        hint = f"did you mean {near[0]!r}" if near else f"there are {', '.join([PLAIN, *named])}"
        raise DataError(f"--layout {name}: there is no layout of that name; {hint}")
    return named[name]


def asked_for(names: str | None) -> Chosen | None:
    """The layouts that `--layout` names, joined by +; None for plain. Raises DataError."""
    if names in (None, PLAIN):
        return None
    layouts = tuple(map(layout_of, str(names).split("+")))
    if len({id(layout.convert) for layout in layouts}) > 1:
        raise DataError(f"--layout {names}: these layouts cannot be combined; name one of them")
    return Chosen(layouts)


def names_of(layouts: Iterable[Layout] = LAYOUTS) -> set[str]:
    """All possible column names of the layouts."""
    return {name for layout in layouts for name in layout.names}


def layout_table() -> str:
    """The layouts as a Markdown table."""
    lines = ["| `--layout` | read as | identified by | conversion | lost |", "|---|---|---|---|---|"]
    for layout in LAYOUTS:
        columns = " and ".join(_shown(names) for names in layout.columns.split())
        lines.append(f"| `{layout.name}` | {layout.title} | {columns} | {layout.becomes} | {layout.lost} |")
    return "\n".join(lines)


def _shown(names: str) -> str:
    first, *others = names.split("|")
    return f"`{first}`" + (f" (or {', '.join(f'`{name}`' for name in others)})" if others else "")
