"""Folders of adapters and of merged models: written, read with and without peft, and refused."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import save
from safetensors.torch import load_file
from test_peft import LORA, make_policy
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dwrl_fast import Scorer
from dwrl_fast.data import read_preferences
from dwrl_fast.errors import ModelError
from dwrl_fast.models import adapters
from dwrl_fast.models.model import load_generative
from dwrl_fast.scoring import marginal_scores


@pytest.mark.parametrize("name", ["dwrl", "bt"])
def test_what_is_exported(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """model/ is a plain folder that loads without peft. adapter/ is a peft folder for the base model."""
    from peft import PeftModel

    policy = make_policy(tiny_config(folder, method=name, **LORA))
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    save(folder / "run" / "model", policy)
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters())
    auto = AutoModelForSequenceClassification if name == "bt" else AutoModelForCausalLM
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    expected = policy.model.lm(ids).logits

    base = auto.from_pretrained(folder / "tiny", **{"num_labels": 1} if name == "bt" else {})
    with_peft = PeftModel.from_pretrained(base, folder / "run" / "adapter").eval()
    torch.testing.assert_close(with_peft(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert {p.suffix for p in (folder / "run").rglob("*") if p.is_file()} <= {".json", ".safetensors", ".jinja"}

    monkeypatch.setitem(sys.modules, "peft", None)
    plainly = auto.from_pretrained(folder / "run" / "model")
    assert set(load_file(folder / "run" / "model" / "model.safetensors")) == {n for n, _ in plainly.named_parameters()}
    torch.testing.assert_close(plainly(ids).logits, expected, rtol=1e-5, atol=1e-5)
    text = (folder / "run" / "model" / "config.json").read_text()
    assert "tree" not in text and "quantization" not in text


def test_a_folder_of_adapters_loads_as_what_it_merges_into(folder: Path) -> None:
    policy = make_policy(tiny_config(folder, **LORA))
    save(folder / "run" / "model", policy)
    scores = []
    for name in ("model", "adapter"):
        scorer = Scorer.from_pretrained(folder / "run" / name, dtype="fp32")
        rows = read_preferences(folder / "pairs.jsonl").rows
        scores.append(marginal_scores(scorer.score_groups(rows)))
    assert torch.equal(*scores)
    with pytest.raises(ModelError, match="is an adapter, and --use_peft trains a new one"):
        make_policy(dataclasses.replace(policy.method.config, model_name_or_path=str(folder / "run" / "adapter")))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no base": (lambda f: _config(f, base_model_name_or_path=None), "does not say which model"),
    "another method": (lambda f: _config(f, peft_type="PREFIX_TUNING"), "cannot be merged"),
    "biases": (lambda f: _config(f, bias="all"), "more than plain LoRA"),
    "a variant": (lambda f: _config(f, use_dora=True), "does not fit its base.*magnitude"),
    "another base": (lambda f: _config(f, r=2), "size mismatch"),
    "other layers": (lambda f: _config(f, target_modules=["q_proj"]), "does not fit its base .*lora"),
    "no weights": (lambda f: (f / adapters.WEIGHTS).unlink(), "cannot be merged into its base: No such file"),
}


def _config(folder: Path, **changes: Any) -> None:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 5}, ""),
        ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "lora_dropout": 0.5}, ""),
        ({"target_modules": ["q_proj", "lm_head"]}, "more than plain LoRA"),
        ({"target_modules": ["embed_tokens"]}, "more than plain LoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "more than plain LoRA"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "more than plain LoRA"),
    ],
    ids=str,
)
def test_adapters_that_peft_wrote(folder: Path, options: dict[str, Any], said: str) -> None:
    """They merge as in peft, or are refused."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    model = get_peft_model(base, LoraConfig(**options, init_lora_weights=False))
    model.save_pretrained(folder / "adapter")
    if said:
        with pytest.raises(ModelError, match=said):
            load_generative(str(folder / "adapter"), None, 0)
        return
    found = dict(load_generative(str(folder / "adapter"), None, 0).lm.named_parameters())
    for name, expected in model.merge_and_unload().named_parameters():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", BROKEN)
def test_adapters_that_cannot_be_merged(folder: Path, case: str) -> None:
    spoil, said = BROKEN[case]
    save(folder / "run" / "model", make_policy(tiny_config(folder, **LORA)))
    spoil(folder / "run" / "adapter")
    with pytest.raises(ModelError, match=said):
        load_generative(str(folder / "run" / "adapter"), None, 0)
