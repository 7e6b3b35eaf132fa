"""The code blocks of README and of the documentation, and the statements of those in shell.

A block that the tests cannot run has a comment before it that says what the machine would need: `<!-- needs: gpu -->`.
"""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from conftest import ROOT
from markdown_it import MarkdownIt

PAGES = ["README.md", "CONTRIBUTING.md", "recipes/README.md", "bench/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
TUTORIALS = [page for page in PAGES if page.startswith("docs/tutorials/")]
LANGUAGES = ("sh", "python", "json", "yaml", "text")
NEEDS = ("gpu", "server", "build", "trl")  # build: it compiles or tests the checkout itself; trl: a slow test runs it
MARK = re.compile(r"<!-- needs: (.+?) -->\s*")


class Block(NamedTuple):
    """A code block: where it stands, its language, and what its mark says that it needs."""

    where: str
    language: str
    code: str
    needs: str


def blocks(page: str, language: str = "") -> list[Block]:
    """The blocks of a page, fenced and indented ones; those of one language if it is named."""
    found, needs = [], ""
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text("utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            found.append(Block(f"{page}:{token.map[0] + 1}", token.info.strip(), token.content, needs))
        mark = MARK.fullmatch(token.content) if token.type == "html_block" else None
        needs = "" if mark is None else mark[1]
    return [block for block in found if language in ("", block.language)]


def statements(code: str) -> Iterator[str]:
    """The statements of a shell block: lines that go on are joined, a here-document stays whole, comments are gone."""
    lines = iter(code.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)
        if end := re.search(r"<<'(\w+)'", line):
            line = "\n".join([line, *iter(lines.__next__, end[1]), end[1]])
        if line.strip() and not line.startswith("#"):
            yield line


def words(statement: str) -> list[str]:
    """The words of a statement's first line, without variables that are set for it alone."""
    found = shlex.split(statement.partition("\n")[0], comments=True)
    return found[next(i for i, word in enumerate(found) if "=" not in word) :]
