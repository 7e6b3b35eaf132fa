"""The documentation and the --help texts are plain technical English: short sentences and the glossary's terms.

A failure names file, line and words, and what to write instead. The rules are in prose_rules.yaml.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT

from dwrl_fast.compare import CompareConfig
from dwrl_fast.config import EvaluateConfig, TrainConfig
from dwrl_fast.data.__main__ import DataConfig
from dwrl_fast.dialog.__main__ import ShowConfig
from dwrl_fast.doctor.options import DoctorConfig
from dwrl_fast.options import Options, help_page
from dwrl_fast.plan import PlanConfig

pytest.importorskip("proselint", reason="proselint is not installed (pip install proselint)")
from prose import RULES, Passage, faults, of_help, of_markdown

PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "bench/*.md", "recipes/*.md")
    for path in ROOT.glob(pattern)
)
COMMANDS = [TrainConfig, EvaluateConfig, CompareConfig, DataConfig, ShowConfig, DoctorConfig, PlanConfig]


def found(passages: Iterable[Passage]) -> str:
    """The faults, one per line."""
    return "\n".join(map(str, faults([*passages])))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_are_plain_english(page: Path) -> None:
    text = found(of_markdown(str(page), (ROOT / page).read_text("utf-8")))
    assert not text, f"\n{text}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.command)
def test_help_is_plain_english(command: type[Options]) -> None:
    text = found(of_help(command.command, help_page(command, 10**6)))
    assert not text, f"\n{text}"


@pytest.mark.parametrize(
    ("planted", "line", "instead"),
    [
        ("The run ends.\nThe rest is said at\nthe start.", 2, "is reported"),
        ("| a | b |\n|---|---|\n| one | it stands where it was |", 3, "is, are"),
        ("- What fails is\n  refused.", 1, "a noun as the subject"),
        ("It reads no file, nor does it write one.", 1, "and ... not"),
        ("The the run ends.", 1, "lexical_illusions"),
        ("We shall attach hereto the aforementioned.", 1, "must, should"),
        ("A run ends" + " and starts again" * 15 + ".", 1, "shorter sentences than 48 words"),
    ],
)
def test_a_planted_fault_is_found(planted: str, line: int, instead: str) -> None:
    assert re.search(rf"^page.md:{line}: .*{instead}", found(of_markdown("page.md", planted)), re.M)


def test_what_is_not_prose_is_not_read() -> None:
    code = "```\n# it is said\n```\n\n    it is said\n\n<!-- it is said -->\n\n"
    assert not found(
        of_markdown("page.md", code + "Call `it is said`, $it is said$ or https://example.org/it-is-said.")
    )


def test_each_rule_is_a_regular_expression_with_a_remedy() -> None:
    assert all(re.compile(pattern) and isinstance(instead, str) for pattern, instead in RULES["phrases"].items())
