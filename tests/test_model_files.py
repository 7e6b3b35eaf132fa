"""Model folders: missing or foreign weights, tied and untied heads, changed cards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import save
from safetensors.torch import load_file, save_file
from test_peft import LORA, make_policy
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dwrl_fast import Scorer
from dwrl_fast.errors import ModelError
from dwrl_fast.evaluate import main as evaluate
from dwrl_fast.models.model import load_generative
from dwrl_fast.models.pretrained import CARD

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def trained(module_folder: Path) -> Path:
    for name in ("dwrl", "bt", "dpo"):
        save(module_folder / name, make_policy(tiny_config(module_folder, method=name)))
    return module_folder


def copied(trained: Path, name: str, to: Path) -> Path:
    return Path(shutil.copytree(trained / name, to / name))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"])}


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


CHANGED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "no scalar head": ("bt", without("score"), r"lacks score\.weight"),
    "a layer less": ("dwrl", without("layers.1."), r"lacks model\.layers\.1\..* and 3 more"),
    "other names": (
        "dwrl",
        lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()},
        r"lacks lm_head.* and also holds x\.model",
    ),
    "another size": (
        "dwrl",
        lambda tensors: tensors | {"model.norm.weight": torch.ones(3)},
        r"has model\.norm\.weight as \[3\] for \[16\]",
    ),
    "one more": ("dwrl", lambda tensors: tensors | {"extra.weight": torch.ones(2)}, r"also holds extra\.weight"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_weights_that_are_not_the_models_are_an_error(trained: Path, tmp_path: Path, what: str) -> None:
    name, change, said = CHANGED[what]
    folder = copied(trained, name, tmp_path)
    Scorer.from_pretrained(folder, dtype="fp32")
    change_weights(folder, change)
    with pytest.raises(ModelError, match=rf"the weights in .*{name} are not those of Llama.*{said}"):
        Scorer.from_pretrained(folder, dtype="fp32")
    with pytest.raises(ModelError, match=said):
        evaluate(["--model_name_or_path", str(folder), "--dataset_name", f"{trained}/pairs.jsonl"])


def test_weights_in_a_pickle_are_not_read(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, "dwrl", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        Scorer.from_pretrained(folder, dtype="fp32")


def test_a_new_scalar_head_is_drawn_only_to_be_trained(trained: Path, tmp_path: Path) -> None:
    """It replaces the untied head of a language model."""
    folder = copied(trained, "dwrl", tmp_path)
    change_weights(folder, with_head)
    make_policy(tiny_config(trained, method="bt", model_name_or_path=str(folder)))
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"method": "bt"}))
    with pytest.raises(ModelError, match=r"not those of LlamaForSequenceClassification: .*lacks score\.weight"):
        Scorer.from_pretrained(folder, dtype="fp32")
    scalar = copied(trained, "bt", tmp_path)
    values = {"method": "dwrl", "temperature": 1.0, "max_completion_length": 6, "score_normalization": "vocab"}
    (scalar / CARD).write_text(json.dumps(json.loads((scalar / CARD).read_text()) | values))
    with pytest.raises(ModelError, match=r"not those of LlamaForCausalLM: .*also holds score\.weight"):
        Scorer.from_pretrained(scalar, dtype="fp32")


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_a_head_of_its_own_under_a_config_that_says_tied_is_kept(trained: Path, tmp_path: Path, adapters: bool) -> None:
    """Some merged checkpoints are like this. The saved model computes the same, and its config says untied."""
    folder = copied(trained, "dwrl", tmp_path)
    change_weights(folder, with_head)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    policy = make_policy(tiny_config(trained, model_name_or_path=str(folder), **LORA if adapters else {}))
    save(tmp_path / "run" / "model", policy)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = policy.model.lm(ids).logits
    plainly = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert adapters or torch.equal(expected, plainly)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(found(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not json.loads((tmp_path / "run" / "model" / "config.json").read_text())["tie_word_embeddings"]
    assert load_generative(str(trained / "dwrl"), None, 0).lm.config.tie_word_embeddings


def test_adapters_name_their_base_by_its_whole_path(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    policy = make_policy(tiny_config(trained, model_name_or_path="tiny", **LORA))
    save(tmp_path / "run" / "model", policy)
    monkeypatch.chdir(tmp_path)
    Scorer.from_pretrained(tmp_path / "run" / "adapter", dtype="fp32")
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(trained / "tiny")


CARDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "inverted temperature": ("dwrl", {"temperature": -1}, r"temperature = -1.0 \(in the card\): must be >= 0.01"),
    "temperature in words": ("dwrl", {"temperature": "warm"}, r"temperature: must be a number, but is text"),
    "a length as text": ("dwrl", {"max_completion_length": "6"}, r"max_completion_length: must be a number"),
    "an endless thought": ("dwrl", {"max_completion_length": 10**30}, r"must be in \[1, 1000000\]"),
    "an empty dialog": ("dwrl", {"dialog": {}}, r"dialog: must hold a template"),
    "a template in words": ("dwrl", {"dialog": {"template": "plain", "aspect": "x"}}, r"dialog: must hold a template"),
    "no temperature": ("dwrl", {"temperature": None}, r"it has no temperature"),
    "no thought": (
        "dwrl",
        {"max_completion_length": 0},
        r"max_completion_length = 0 \(in the card\): must be in",
    ),
    "half a token": ("dwrl", {"max_completion_length": 1.5}, r"max_completion_length = 1.5.*whole number"),
    "another score": ("dwrl", {"score_normalization": "none"}, r"expected one of vocab, yes_no"),
    "no such method": ("dwrl", {"method": "magic"}, r"its method is 'magic', which is not one of dwrl"),
    "a list of methods": ("dwrl", {"method": ["dwrl"]}, r"its method is \['dwrl'\]"),
    "no dialog": ("dwrl", {"dialog": None}, r"it has no dialog"),
    "dialog in words": ("dwrl", {"dialog": "chat"}, r"dialog = 'chat': must be a mapping"),
    "beta below 0": ("dpo", {"beta": -0.1}, r"beta = -0.1 \(in the card\): must be > 0"),
    "reference in words": ("dpo", {"reference": "the base"}, r"reference = 'the base': must be a mapping"),
    "writer": ("bt", {"prefilled_by": 7, "max_completion_length": 6}, r"prefilled_by = 7: must be text"),
    "writer without a limit": ("bt", {"prefilled_by": "tiny"}, r"it has no max_completion_length"),
    "calibration": ("bt", {"calibration": {"temperature": 0}}, r"calibration, temperature = 0: must be a number > 0"),
}


@pytest.mark.parametrize("what", CARDS)
def test_a_card_that_was_changed_is_refused(trained: Path, tmp_path: Path, what: str) -> None:
    name, change, said = CARDS[what]
    folder = copied(trained, name, tmp_path)
    (folder / CARD).write_text(json.dumps(json.loads((folder / CARD).read_text()) | change))
    with pytest.raises(ModelError, match=rf"the card of .*{name} is not valid: .*{said}"):
        Scorer.from_pretrained(folder, dtype="fp32")


def nested(folder: Path) -> None:
    (folder / CARD).write_text("[" * 100_000)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:9000])


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "half the weights": (cut, r"model.safetensors, each whole. Copy it again"),
    "no weights": (
        lambda folder: (folder / WEIGHTS).write_bytes(b""),
        r"has 0 bytes, too few for a safetensors file: copy it again",
    ),
    "a card without an end": (nested, r"cannot be read as a model's card"),
    "no heads": (configured(num_attention_heads=0), r"cannot load a (model|tokenizer)"),
    "layers in words": (configured(num_hidden_layers="two"), r"cannot load a (model|tokenizer)"),
    "no such dtype": (configured(dtype="zz"), r"cannot load a (model|tokenizer)"),
    "no config": (lambda folder: (folder / "config.json").write_text("[]"), r"cannot load a (model|tokenizer)"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_folder_is_said_without_a_traceback(trained: Path, tmp_path: Path, what: str) -> None:
    change, said = DAMAGED[what]
    folder = copied(trained, "dwrl", tmp_path)
    change(folder)
    with pytest.raises(ModelError, match=said):
        Scorer.from_pretrained(folder, dtype="fp32")


def test_adapters_without_their_base_say_where_it_is_named(trained: Path, tmp_path: Path) -> None:
    base = copied(trained, "tiny", tmp_path)
    policy = make_policy(tiny_config(trained, model_name_or_path=str(base), **LORA))
    save(tmp_path / "run" / "model", policy)
    modes = {file.stat().st_mode for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert len(modes) == 1, "who can read the config can read the weights"
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"adapter holds adapters of .*tiny, .* base_model_name_or_path"):
        Scorer.from_pretrained(tmp_path / "run" / "adapter", dtype="fp32")
    written = tmp_path / "run" / "adapter" / "adapter_config.json"
    written.write_text(written.read_text().replace(str(base), str(tmp_path / "elsewhere")))
    Scorer.from_pretrained(tmp_path / "run" / "adapter", dtype="fp32")
