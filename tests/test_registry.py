"""The registry of methods, and the method that the documentation adds to it."""

import re
from pathlib import Path
from typing import Any

import pytest
from dwrl_fast.registry import REGISTRY
from tiny import tiny_config, tiny_folder, tiny_pairs

from dwrl_fast.batching.batch import Size
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import read_preferences
from dwrl_fast.methods import METHODS, StepMetrics
from dwrl_fast.options import help_page
from dwrl_fast.scoring.loading import load_dialog

DOCS = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_is_what_its_line_says(name: str) -> None:
    assert METHODS[name].name == name
    assert f"`{name}`" in DOCS and f"{name}: " in help_page(TrainConfig, 10_000)


def test_the_methods_are_those_of_the_papers() -> None:
    assert set(REGISTRY) == {
        *("bt", "gram", "grpo-pair", "grpo-point", "genrm", "star-sft", "star-dpo", "star-rationalizer", "pairrm"),
        *("judge", "sft", "dpo", "dwrl", "btpo"),
    }


def test_the_method_of_the_documentation(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?class Hinge.*?)```", DOCS, re.S)
    made: dict[str, Any] = {}
    exec(source, made)
    tiny_folder(tmp_path / "tiny")
    rows = read_preferences(tiny_pairs(tmp_path / "pairs.jsonl")).rows[:4]
    config = tiny_config(tmp_path, method="bt")
    method = made["Hinge"](config, load_dialog(config), Compute.resolve("fp32"))
    groups, _ = method.rollout(rows, 0, lambda n: None)
    (batch,) = method.layout.batches(groups)
    loss = method.loss("score", batch, Size.of([batch]), StepMetrics())
    rewards = method.model(batch).detach().view(4, 2)
    assert loss.item() == pytest.approx((1 - rewards[:, 0] + rewards[:, 1]).clamp_min(0).mean().item())
