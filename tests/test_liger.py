"""Liger's kernels against the unchanged model: through Triton's interpreter, and on a GPU if there is one."""

import functools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.models.liger import use_liger, without_liger

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAMILIES = {
    "llama": {"LigerRMSNorm": 5, "LigerSwiGLUMLP": 2},
    "qwen2": {"LigerRMSNorm": 5, "LigerSwiGLUMLP": 2},
    "qwen3": {"LigerRMSNorm": 9, "LigerSwiGLUMLP": 2},
    "mistral": {"LigerRMSNorm": 5, "LigerSwiGLUMLP": 2},
    "gemma2": {"LigerRMSNorm": 9, "LigerGEGLUMLP": 2},
}


def drawn_model(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=50, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **changes,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return lm


def states_and_gradients(lm: Any, ids: Tensor) -> dict[str, Tensor]:
    lm.zero_grad()
    states = lm.base_model(input_ids=ids).last_hidden_state
    states.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    return {"states": states.detach()} | gradients


def assert_parity(family: str, device: str, dtype: torch.dtype, within: float) -> None:
    lm = drawn_model(family).to(device, dtype)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    want = states_and_gradients(lm, ids)
    use_liger(lm)
    got = states_and_gradients(lm, ids)
    found = [m._get_name() for m in lm.modules() if m._get_name().startswith("Liger")]
    assert {name: found.count(name) for name in found} == FAMILIES[family]
    code: Any = sys.modules[type(lm).__module__]
    assert code.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    with without_liger():  # a saved model is compared on the CPU
        assert not any(m._get_name().startswith("Liger") for m in drawn_model(family).modules())
        assert code.apply_rotary_pos_emb.__module__.startswith("transformers")
    assert code.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    assert want.keys() == got.keys() and len(want) > 12
    for name, y in want.items():
        assert got[name].dtype == y.dtype
        assert ((got[name] - y).norm() / y.norm()).item() < within, name


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds what Liger's kernels use and the interpreter of Triton 3.6 and 3.7 lacks."""
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    def convert(convert: Any, argument: object) -> Any:  # NumPy 2.4 requires an array without dimensions for a number
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array(argument, np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    def patch(patch: Any, tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    for name, around in (("_implicit_cvt", convert), ("_patch_lang_tensor", patch)):
        monkeypatch.setattr(interpreter, name, functools.partial(around, getattr(interpreter, name)))
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # instead of the CUDA library's
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: test_through_the_interpreter runs it")
@pytest.mark.parametrize("family", FAMILIES)
def test_interpreted(interpreter: None, family: str) -> None:
    assert_parity(family, "cpu", torch.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it is what started this")
def test_through_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "-k", "test_interpreted", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and f"{len(FAMILIES)} passed" in run.stdout, run.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family: str, dtype: torch.dtype, within: float) -> None:
    assert_parity(family, "cuda", dtype, within)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands for a GPU")
def test_off_cuda() -> None:
    with pytest.raises(ConfigError, match="the model is on cpu"):
        use_liger(drawn_model("llama"))


def test_an_unknown_family(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = drawn_model("gpt_neox")
    monkeypatch.setattr(type(lm), "device", torch.device("cuda"))
    with pytest.raises(ModelError, match=r"the family 'gpt_neox' of GPTNeoXForCausalLM; .*llama.*qwen3"):
        use_liger(lm)


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        use_liger(None)
