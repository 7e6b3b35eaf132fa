"""The sentences of Markdown files and --help pages, and the rules of plain English (prose_rules.yaml) that they break."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from proselint.checks import __register__ as CHECKS
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

RULES = yaml.safe_load(Path(__file__).with_name("prose_rules.yaml").read_text(encoding="utf-8"))
PHRASES = [(re.compile(pattern), instead) for pattern, instead in RULES["phrases"].items()]
CODE = "□"  # stands for code, a formula or an address
UNREAD = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$|https?://\S+|(?<!\w)--[\w-]+", re.S)
END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!\bal\.)[)\"*]*\s+")
WORD = re.compile(rf"[^\W\d]\w*|{CODE}")


class Passage(NamedTuple):
    """A paragraph, heading, table cell or help text that begins in `line` of `place`, with its line breaks."""

    place: str
    line: int
    text: str


class Fault(NamedTuple):
    """What is wrong in a line, and what to write instead."""

    place: str
    line: int
    found: str
    instead: str

    def __str__(self) -> str:
        return f"{self.place}:{self.line}: {self.found!r}: write {self.instead}"


def of_markdown(place: str, text: str) -> Iterator[Passage]:
    """What a reader reads: no code, no comments, no addresses."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "inline" and token.map is not None:
            words = "".join(map(_read, token.children or ()))
            yield Passage(place, token.map[0] + 1, UNREAD.sub(CODE, words))


def of_help(command: str, page: str) -> Iterator[Passage]:
    """The texts of a --help page whose lines are not wrapped, and the comments of its examples."""
    for number, line in enumerate(page.splitlines(), 1):
        if not re.match(r"Usage|  (--|python|torchrun| +--)", line):
            yield Passage(f"{command} --help", number, UNREAD.sub(CODE, line.strip(" #")))


def faults(passages: Sequence[Passage]) -> list[Fault]:
    """All faults, of proselint and of our own rules."""
    return [fault for passage in passages for fault in (*_own(passage), *_proselint(passage))]


def _read(token: Token) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return "\n"
    if token.type == "code_inline":
        return CODE
    return token.content if token.type in ("text", "image") else ""


def _own(passage: Passage) -> Iterator[Fault]:
    place, line, text = passage
    start = 0
    flat = text.replace("\n", " ")
    for end in [*(match.end() for match in END.finditer(flat)), len(flat)]:
        sentence = flat[start:end].strip()
        at = line + text[:start].count("\n")
        if (words := len(WORD.findall(sentence))) > RULES["longest"]:
            yield Fault(place, at, f"{sentence[:40]}...", f"shorter sentences than {words} words")
        for pattern, instead in PHRASES:
            if match := pattern.search(sentence):
                yield Fault(place, at + text[start : start + match.start()].count("\n"), match[0].strip(), instead)
        start = end


def _proselint(passage: Passage) -> Iterator[Fault]:
    registry = CheckRegistry()
    if not registry.checks:
        registry.register_many(CHECKS)
    config = {"max_errors": 1000, "checks": dict.fromkeys(RULES["proselint"], True)}
    for found in LintFile(passage.place, passage.text).lint(config):
        yield Fault(passage.place, passage.line + found.line - 2, passage.text, f"{found.message} ({found.check_path})")
