"""The layouts that public preference data come in, and which of them a file has. The reader itself knows none of them.

What a layout makes of a row is a row of one of our formats, which is then judged as any is.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dwrl_fast.data.columns import quoted
from dwrl_fast.data.formats import Format, recognise
from dwrl_fast.data.layouts.layout import OURS, Layout, Published
from dwrl_fast.data.layouts.many import MANY
from dwrl_fast.data.layouts.pairs import LISTED, PAIRS
from dwrl_fast.data.layouts.prompts import PROMPT
from dwrl_fast.data.layouts.verdicts import VERDICTS
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
PLAIN = "plain"  # the formats of ours, as they stand


@dataclass(frozen=True)
class Chosen:
    """The layouts that a file has, all of one convert."""

    layouts: tuple[Layout, ...]

    @property
    def title(self) -> str:
        """What the rows are read as."""
        return " + ".join(layout.title for layout in self.layouts)

    @property
    def names(self) -> str:
        """As `--layout` has them."""
        return "+".join(layout.name for layout in self.layouts)

    @property
    def form(self) -> Format:
        """What its rows become."""
        return self.layouts[0].form

    def check_first(self, values: Mapping[str, Any], mapping: Mapping[str, str], source: str) -> None:
        """Raises DataError where a mapped column is not there, or nobody reads what it is mapped to."""
        read = names_of(self.layouts) | self.form.columns | set(PROMPT.split("|")) | set(OURS)
        for name, theirs in mapping.items():
            if theirs not in values or name not in read:
                absent = f"no column '{theirs}' among {quoted(values)}"
                wrong = absent if theirs not in values else f"no '{name}' is read"
                raise DataError(
                    f"{source}: --columns {name}={theirs}: {wrong}; the rows are read as {self.title}. Correct the "
                    "option or leave it out"
                )

    def row(self, values: Mapping[str, Any], source: str, aspect: str | None) -> tuple[dict[str, Any], Published]:
        """A published row as a row of ours, and what was read of it. Raises DataError or Unusable."""
        published = Published(values, source, self.title, aspect)
        return self.layouts[0].convert(published), published


def choose(values: Mapping[str, Any], source: str) -> Chosen | None:
    """The layout of a file that has this row; None where it is one of our formats, or of no layout. Raises DataError
    where it can be several.
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
    """The row with the columns under our names that `mapping` gives as theirs."""
    if not mapping:
        return values
    theirs = {name: key for key, name in mapping.items()}
    kept = {name: value for name, value in values.items() if name not in theirs and name not in mapping}
    return kept | {key: values[name] for key, name in mapping.items() if name in values}


def layout_of(name: str) -> Layout:
    """The layout of this name. Raises DataError where there is none."""
    named = {layout.name: layout for layout in LAYOUTS}
    if name not in named:
        near = difflib.get_close_matches(name, [PLAIN, *named], n=1)
        hint = f"did you mean {near[0]!r}" if near else f"there are {', '.join([PLAIN, *named])}"
        raise DataError(f"--layout {name}: there is no layout of that name; {hint}")
    return named[name]


def asked_for(names: str | None) -> Chosen | None:
    """The layouts of `--layout`, with + between those that go together; None for plain. Raises DataError."""
    if names in (None, PLAIN):
        return None
    layouts = tuple(map(layout_of, str(names).split("+")))
    if len({id(layout.convert) for layout in layouts}) > 1:
        raise DataError(f"--layout {names}: these layouts cannot be combined; name one of them")
    return Chosen(layouts)


def names_of(layouts: Iterable[Layout] = LAYOUTS) -> set[str]:
    """The columns of layouts, by all the names they may have."""
    return {name for layout in layouts for name in layout.names}


def layout_table() -> str:
    """The layouts as a table of Markdown."""
    lines = ["| `--layout` | read as | told by | what becomes of it | not carried |", "|---|---|---|---|---|"]
    for layout in LAYOUTS:
        columns = " and ".join(_shown(names) for names in layout.columns.split())
        lines.append(f"| `{layout.name}` | {layout.title} | {columns} | {layout.becomes} | {layout.lost} |")
    return "\n".join(lines)


def _shown(names: str) -> str:
    first, *others = names.split("|")
    return f"`{first}`" + (f" (or {', '.join(f'`{name}`' for name in others)})" if others else "")
