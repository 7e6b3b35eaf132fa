"""A run warns at its first rollout batch about figures that make learning slow."""

import logging
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tiny_folder, tiny_pairs

from dwrl_fast.config import TrainConfig
from dwrl_fast.train import run
from dwrl_fast.training.first_figures import warnings


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"label_mass": 0.34, "truncation_rate": 0.1}, ["the two labels together have only probability 0.34"]),
        ({"label_mass": 0.9, "truncation_rate": 0.6}, ["60% of the thoughts are cut at --max_completion_length 48"]),
        ({"unparsable": 0.5, "truncation_rate": 0.9}, ["90% of the thoughts", "50% of the verdicts cannot be read"]),
        ({"label_mass": 0.9, "truncation_rate": 0.0, "loss": 0.7}, []),
        ({"loss": 0.7}, []),
    ],
)
def test_bad_figures_are_named(figures: dict[str, float], said: list[str]) -> None:
    found = list(warnings(figures, TrainConfig(max_completion_length=48)))
    assert len(found) == len(said) and all(line.startswith(start) for line, start in zip(found, said, strict=True))


@pytest.mark.parametrize(("template", "named"), [("dialog", True), ("brief", False)])
def test_the_template_in_use_is_not_the_remedy(template: str, named: bool) -> None:
    (line,) = warnings({"truncation_rate": 0.9}, TrainConfig(template=template))
    assert ("--template brief" in line) == named


def test_a_run_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(
        model_name_or_path=str(tiny_folder(tmp_path / "model")),
        dataset_name=str(tiny_pairs(tmp_path / "pairs.jsonl", 12)),
        output_dir=str(tmp_path / "run"),
        rollout_batch_size=4,
        minibatch_size=4,
        max_completion_length=2,
        num_train_epochs=1,
    )
    with caplog.at_level(logging.WARNING):
        run(config, Console())
    said = [line for line in caplog.messages if line.startswith("first rollout batch: ")]
    assert any("of the thoughts are cut at --max_completion_length 2." in line for line in said)
    assert len(said) == len(set(said)) <= 2
