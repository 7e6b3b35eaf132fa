"""The sentences of Markdown files and --help pages, and their faults by the rules of prose_rules.yaml."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from proselint.checks import __register__ as CHECKS
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

RULES = yaml.safe_load(Path(__file__).with_name("prose_rules.yaml").read_text(encoding="utf-8"))
PHRASES = [(re.compile(pattern, re.I), instead) for pattern, instead in RULES["phrases"].items()]
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
    """Words that break a rule, and the remedy."""

    place: str
    line: int
    words: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.place}:{self.line}: {self.words!r}: {self.remedy}"


def of_markdown(place: str, text: str) -> Iterator[Passage]:
    """The prose of a Markdown text, without code, comments and addresses."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "inline" and token.map is not None:
            words = "".join(map(_read, token.children or ()))
            if words:
                yield Passage(place, token.map[0] + 1, UNREAD.sub(_blank, words))


def of_help(command: str, page: str) -> Iterator[Passage]:
    """The texts of a --help page whose lines are not wrapped, and the comments of its examples."""
    for number, line in enumerate(page.splitlines(), 1):
        if not re.match(r"Usage|  (--|python|torchrun| +--)", line):
            yield Passage(f"{command} --help", number, UNREAD.sub(_blank, line.strip(" #")))


def faults(passages: Sequence[Passage]) -> list[Fault]:
    """All faults of the passages of one place, by our own rules and by proselint."""
    return [*(fault for passage in passages for fault in _own(passage)), *_proselint(passages)]


def _read(token: Token) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return "\n"
    if token.type == "code_inline":
        return CODE
    return token.content if token.type in ("text", "image") else ""


def _blank(match: re.Match[str]) -> str:
    return CODE + "\n" * match[0].count("\n")


def _own(passage: Passage) -> Iterator[Fault]:
    place, line, text = passage
    start = 0
    flat = text.replace("\n", " ")
    for end in [*(match.end() for match in END.finditer(flat)), len(flat)]:
        sentence = flat[start:end].strip()
        at = line + text[:start].count("\n")
        if (words := len(WORD.findall(sentence))) > RULES["longest"]:
            yield Fault(place, at, f"{sentence[:40]}...", f"write shorter sentences than {words} words")
        for pattern, instead in PHRASES:
            if match := pattern.search(sentence):
                into = text[start : start + match.start()].count("\n")
                yield Fault(place, at + into, match[0].strip(), f"write {instead}")
        start = end


def _proselint(passages: Sequence[Passage]) -> Iterator[Fault]:
    if not CheckRegistry().checks:
        CheckRegistry().register_many(CHECKS)
    file = LintFile("", f"\n{CODE}\n".join(passage.text for passage in passages))
    begins = list(accumulate((len(passage.text) + 3 for passage in passages), initial=1))
    for found, _ in file.lint({"max_errors": 1000, "checks": dict.fromkeys(RULES["proselint"], True)}):
        words = file.content[slice(*found.span)]
        start = found.span[0] + len(words) - len(words.lstrip())
        i = bisect_right(begins, start) - 1
        at = passages[i].line + file.content[begins[i] : start].count("\n")
        yield Fault(passages[i].place, at, words.strip(), f"{found.replacements or found.message} ({found.check_path})")
