"""Several processes compared with one: gradients, figures and weights of every method."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import all_updated, config_of, in_bfloat16, in_bfloat16_over_a_reference
from tiny import tiny_dialog, tiny_folder, tiny_model, tiny_pairs
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from bench.processes import together
from dwrl_fast.config import TrainConfig
from dwrl_fast.models.model import GenerativeModel
from dwrl_fast.models.pretrained import save_pretrained

pytestmark = pytest.mark.slow
LORA = {"use_peft": True, "lora_r": 3, "lora_alpha": 4}
# 11 rows in minibatches of 4: the last one has 3 groups, so one of four ranks has none.
CASES: dict[str, dict[str, Any]] = {
    "dwrl": {"method": "dwrl"},
    "dwrl, untied, checkpointing": {"method": "dwrl", "model": "untied", "gradient_checkpointing": True},
    "dwrl, padded": {"method": "dwrl", "packing": "padded"},
    "dwrl, kept whole": {"method": "dwrl", "reshard_after_backward": False},
    "btpo": {"method": "btpo"},
    "bt": {"method": "bt"},
    "grpo-pair": {"method": "grpo-pair"},
    "dpo": {"method": "dpo"},
    "star-dpo": {"method": "star-dpo"},
    "dwrl, LoRA": {"method": "dwrl", **LORA},
    "dpo, LoRA": {"method": "dpo", **LORA},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, another model with an untied head, and 11 pairs."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_folder(folder / "tiny")
    tiny_pairs(folder / "pairs.jsonl", 11)
    config = tiny_model().lm.config
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        card = {"method": "dwrl", "score_normalization": "vocab", "temperature": 1.0, "max_completion_length": 6}
        save_pretrained(folder / "untied", GenerativeModel(LlamaForCausalLM(config)), tiny_dialog(), card)
    return folder


def configs(folder: Path, **changes: Any) -> dict[str, TrainConfig]:
    made = {}
    for name, case in CASES.items():
        case = dict(case)
        model = {"model_name_or_path": str(folder / case.pop("model", "tiny"))}
        made[name] = config_of(folder, **model, **case, **changes)
    return made


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two tensors of the same name, relative to the norm of the first."""
    assert one.keys() == other.keys()
    return max(((other[n] - x).norm() / x.norm().clamp_min(1e-30)).item() for n, x in one.items())


@pytest.fixture(scope="module")
def of_one(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of one process: in float32 after one rollout batch, and in float64 after four."""
    (found,) = together(folder, 1, all_updated, configs(folder, learning_rate=1e-3))
    return found


def test_bfloat16_is_computed_over_float32_masters(folder: Path) -> None:
    """A bfloat16 file is read as bfloat16, and each rank casts its part to float32. The replica stays in bfloat16."""
    shutil.copytree(folder / "tiny", folder / "bf16")
    lm = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.bfloat16)
    lm.save_pretrained(folder / "bf16")
    config = config_of(folder, model_name_or_path=str(folder / "bf16"), dtype="bf16", learning_rate=1e-2)
    one, two = together(folder, 2, in_bfloat16, config)
    assert one["masters"] == two["masters"] == {"torch.float32"}
    file = {f"lm.{name}": p for name, p in lm.named_parameters()}
    for name, started in one["started"].items():
        assert torch.equal(started, file[name].float()) and one["before"][name].dtype == torch.bfloat16
        assert torch.equal(one["before"][name].float(), started)
        ended = one["ended"][name]
        assert not torch.equal(ended, started) and not torch.equal(ended, ended.bfloat16().float())
        for found in (one, two):
            assert torch.equal(found["now"][name], ended.bfloat16())
    assert "ended" not in two


def test_dpo_in_bfloat16_reduces_in_float32(folder: Path) -> None:
    """With adapters, the first pass of a run has them switched off and has nothing to train."""
    config = config_of(folder, method="dpo", dtype="bf16", model_name_or_path=str(folder / "tiny"), lora_r=3)
    for found in together(folder, 2, in_bfloat16_over_a_reference, config):
        for gradient in found.values():
            assert {x.dtype for x in gradient.values()} == {torch.float32}
            assert sum(x.norm() for x in gradient.values()) > 0


@pytest.mark.parametrize("count", [2, 4])
def test_updates_are_those_of_one_process(folder: Path, of_one: Any, count: int) -> None:
    several = together(folder, count, all_updated, configs(folder, learning_rate=1e-3))
    for kind, bound in (("float32", 1e-5), ("float64", 1e-9)):
        for name, one in of_one[kind].items():
            for rank, found in enumerate(several):
                two = found[kind][name]
                for phase, expected in one["gradients"].items():
                    assert sum(x.norm() for x in expected.values()) > 0
                    assert apart(expected, two["gradients"][phase]) < bound, (kind, name, phase)
                for mean, other in zip(one["means"], two["means"], strict=True):
                    assert mean.keys() == other.keys()
                    # Leads are 0 at first, so `reward_accuracy` depends on rounding.
                    known = {k: x for k, x in mean.items() if x == x and k != "reward_accuracy"}
                    assert all(abs(other[k] - x) <= 1e-4 * abs(x) + 1e-7 for k, x in known.items()), name
                assert ("weights" in two) == (rank == 0)
                assert [*map(len, two["scores"])] == [*map(len, one["scores"])]
            if kind == "float64":
                assert len(one["norms"]) >= 10
                assert apart(one["weights"], several[0][kind][name]["weights"]) < bound, name
