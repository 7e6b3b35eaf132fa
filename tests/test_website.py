"""The pages of the documentation site that are made from the package and from `bench/results` are complete."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from dwrl_fast.options import option_fields
from website.option_tables import COMMANDS, command_page
from website.result_tables import APART, cell, empty, results_page, section, told

RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_has_a_row(name: str) -> None:
    page = command_page(name)
    shown = page + (command_page("train") if "(train.md)" in page else "")
    missing = [f.name for f in option_fields(COMMANDS[name]) if f"| `--{f.name}`{{ #{f.name} }} | " not in shown]
    assert not missing
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}, "four cells each"


def leaves(content: Any) -> Iterator[Any]:
    """All figures and texts of a result file, except those that the page leaves out (APART)."""
    if isinstance(content, dict):
        for name, part in content.items():
            if name not in APART:
                yield from leaves(part)
    elif isinstance(content, list):
        for part in content:
            yield from leaves(part)
    elif not empty(content):
        yield content


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_figure_of_a_result_file_is_shown(path: Path) -> None:
    content, shown = json.loads(path.read_text("utf-8")), section(path)
    assert f"bench/results/{path.name}" in shown and "; commit `" in shown
    assert not [value for value in leaves(content) if cell(value).replace("|", "\\|") not in shown]


def test_the_page_has_every_file_and_says_where_it_was_measured() -> None:
    page = results_page(ROOT / "bench" / "results")
    assert all(f"### {path.stem}\n" in page for path in RESULTS)
    machine = {"cpu": "Xeon", "cores": 2, "threads": 1, "capability": "AVX512", "gpu": None, "python": "3.11.7"}
    machine |= {"versions": {"torch": "2.13.0"}, "commit": "7a159cd32ed3"}
    assert told(machine) == "Xeon (2 cores, 1 threads, AVX512), Python 3.11.7, torch 2.13.0; commit `7a159cd`."
