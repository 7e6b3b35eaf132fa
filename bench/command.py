"""What the benchmark commands share: a help text that names the command, and tables."""

import argparse
from collections.abc import Iterable

from rich.table import Column, Table


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m bench.<name>`. about: the docstring of its module, shown without reformatting."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> Table:
    """A table of `rows` of cells. left: the number of leading text columns; the others are right-aligned."""
    columns = (Column(heading, justify="right" if i >= left else "left") for i, heading in enumerate(headings))
    made = Table(*columns, title=title, title_justify="left")
    for row in rows:
        made.add_row(*row)
    return made
