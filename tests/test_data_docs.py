"""The examples in docs/data.md are read as the formats that they illustrate."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from dwrl_fast.data import read_preferences

EXAMPLES = re.findall(
    r"^\*\*([A-Z]+)\*\*:.*?```json\n(.*?)```", (ROOT / "docs/data.md").read_text("utf-8"), re.M | re.S
)


def test_every_format_has_two_lines() -> None:
    assert [name for name, _ in EXAMPLES] == ["BINARY", "BINARYMAGN", "RANKING", "SINGLE", "DEMONSTRATION"]
    assert all(lines.count("\n") == 2 for _, lines in EXAMPLES)


@pytest.mark.parametrize(("name", "lines"), EXAMPLES)
def test_examples_are_read(tmp_path: Path, name: str, lines: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines, encoding="utf-8")
    dataset = read_preferences(path, ties="keep")
    assert (dataset.format, dataset.used, sum(map(len, dataset.dropped.values()))) == (name, 2, 0)
