"""The page of benchmark results: every JSON file of `bench/results` as tables, with machine, versions and commit.

Nothing is chosen or computed here. A list of records becomes a table, and so do records by name; what is nested deeper
follows in tables of its own.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

PARTS = {"h100": "NVIDIA H100", "cpu": "CPU", "simulated": "Simulated"}  # by how a file's name begins
APART = ("benchmark", "machine", "versions", "profile", "kernels")  # in no table: what stands above, and long lists
BAR = "\\|"  # as it can stand in a cell
HEAD = """# Benchmarks

Every table below is printed from a file of `bench/results` when this site is built. Times are in seconds and memory is
in bytes unless a column says otherwise. Where a cell has several numbers they are those of several runs. The times of
single kernels are in the files only.

What the figures mean: [performance](docs/performance.md), [operators](docs/operators.md),
[what is learnt](docs/results.md), [how predictions compare with runs](docs/plan.md). How to measure them again:
[commands](bench/README.md).
"""

Record = dict[str, Any]


def results_page(folder: Path) -> str:
    """The Markdown of the page. KeyError where a file's name begins with none of the known parts."""
    parts: dict[str, list[str]] = {title: [] for title in PARTS.values()}
    for path in sorted(folder.glob("*.json")):
        parts[PARTS[path.stem.partition("_")[0]]].append(section(path))
    return "\n".join([HEAD, *(f"## {title}\n\n" + "\n".join(sections) for title, sections in parts.items())])


def section(path: Path) -> str:
    """One file: its machine, its plot if there is one, and its tables."""
    content = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"### {path.stem}", "", f"[{path.name}](bench/results/{path.name}). {' '.join(machines(content))}", ""]
    if path.with_suffix(".png").exists():
        lines += [f"![{path.stem}](bench/results/{path.stem}.png)", ""]
    for title, rows in tables(content):
        lines += [*([f"**{title}**", ""] if title else []), *table(rows), ""]
    return "\n".join(lines)


def machines(content: Any) -> Iterator[str]:
    """A sentence for each machine that the content names: what it is, versions, commit."""
    if isinstance(content, list):
        for part in content:
            yield from machines(part)
    elif isinstance(content, dict):
        if (machine := content.get("machine")) is not None:
            yield told(machine)
        for part in content.values():
            yield from machines(part)


def told(machine: Record) -> str:
    """One machine in a sentence."""
    versions = machine.get("versions") or {"torch": machine["torch"]}
    names = [machine["gpu"]] if machine["gpu"] else []
    names += [f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads, {machine['capability']})"]
    names += [f"driver {machine['state']['driver_version']}"] if "state" in machine else []
    names += [f"{name} {number}" for name, number in ({"Python": machine["python"]} | versions).items()]
    return f"{', '.join(names)}; commit `{machine['commit'][:7]}`."


def tables(content: Record, title: str = "") -> Iterator[tuple[str, list[Record]]]:
    """The tables of a record, each with its title: the record's own values first, then those of its parts."""
    own: Record = {}
    parts: Record = {}
    for name, value in content.items():
        if name not in APART and not empty(value):
            (own if single(value) else parts)[name] = value
    if own:
        yield title, [own]
    for name, value in parts.items():
        where = f"{title}, {name}" if title else name
        if isinstance(value, list):
            yield from listed(value, where)
        elif all(isinstance(part, dict) for part in value.values()):
            yield from listed([{name: key} | part for key, part in value.items()], title)
        elif all(single(part) for part in value.values()):
            yield where, [{"": key, "value": part} for key, part in value.items()]
        else:
            yield from tables(value, where)


def listed(records: list[Record], title: str) -> Iterator[tuple[str, list[Record]]]:
    """The table of a list of records, and then those of what each one nests."""
    yield title, [flat(record) for record in records]
    for record in records:
        nested = {name: value for name, value in record.items() if nests(value)}
        if nested:
            first = next(iter(record.values()))
            yield from tables(nested, f"{title}, {first}" if title else str(first))


def flat(record: Record) -> Record:
    """A record without what it nests; the values of a record within it beside its own."""
    made: Record = {}
    for name, value in record.items():
        if name in APART or nests(value):
            continue
        if isinstance(value, dict):
            made |= {f"{name}: {key}": part for key, part in value.items()}
        else:
            made[name] = value
    return made


def single(value: Any) -> bool:
    """Whether a value fits a cell: a number, a text, or a list of them."""
    return not isinstance(value, dict | list) or (isinstance(value, list) and all(map(single, value)))


def nests(value: Any) -> bool:
    """Whether a value of a record needs tables of its own."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(not single(part) for part in parts)


def empty(value: Any) -> bool:
    """Whether a value says nothing. 0 and False say something."""
    return value is None or value == "" or (isinstance(value, dict | list) and not value)


def table(rows: list[Record]) -> list[str]:
    """The lines of a Markdown table. A column in which no row has anything is left out."""
    names = [name for name in dict.fromkeys(chain(*rows)) if not all(empty(row.get(name)) for row in rows)]
    return [line(names), "|---" * len(names) + "|", *(line(cell(row.get(name)) for name in names) for row in rows)]


def line(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(text.replace('|', BAR) for text in cells)} |"


def cell(value: Any) -> str:
    """A value as text: four digits of a fraction, thousands of whole numbers set apart."""
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return "" if value is None else f"{value:,.0f}"
