"""The quick checks of the doctor at the start of every training."""

import logging
from pathlib import Path

import pytest
from rich.console import Console
from test_commands import own_data
from test_doctor import edit, weights_changed, with_begin

from dwrl_fast import train
from dwrl_fast.errors import NotFiniteError, TemplateError


def trained(folder: Path, name: str) -> None:
    train.run(train.configure([*own_data(folder), "--output_dir", str(folder / name)]), Console(quiet=True))


def test_a_sound_set_up_is_trained_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(folder, "run")
    assert [r.message for r in caplog.records if r.message.startswith(("BOS", "padding", "memory", "generation"))] == []


def test_what_warns_is_said_and_trained(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder / "tiny" / "generation_config.json", top_k=20)
    edit(folder / "tiny" / "tokenizer_config.json", padding_side="right")
    with caplog.at_level(logging.WARNING):
        trained(folder, "run")
    said = [record.message for record in caplog.records]
    assert sum("generation_config: top_k 20" in each for each in said) == 1
    assert sum("padding: " in each and '"padding_side": "left"' in each for each in said) == 1
    assert (folder / "run" / "model").is_dir()


def test_what_fails_ends_the_run_before_it_begins(folder: Path) -> None:
    sound = (folder / "tiny" / "model.safetensors").read_bytes()
    weights_changed(folder, "model.embed_tokens.weight", float("inf"))
    with pytest.raises(NotFiniteError, match=r"in model\.embed_tokens\.weight.*copy the model again"):
        trained(folder, "run")
    (folder / "tiny" / "model.safetensors").write_bytes(sound)
    with_begin(folder, "{{ bos_token }}{{ bos_token }}", added=True)
    with pytest.raises(TemplateError, match=r"BOS: .* 2 times .* chat template"):
        trained(folder, "run")
    assert not (folder / "run" / "config.yaml").exists()
