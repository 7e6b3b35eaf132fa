"""A warning about slow bfloat16 appears before the first step."""

import logging
from typing import Any

import pytest
import torch

from dwrl_fast.compute import Compute, multiplies_bfloat16
from dwrl_fast.log import logger

X86 = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
NEON = {"architecture": "arm64", "neon": True, "bf16": False}


def resolved(dtype: str, capabilities: dict[str, Any] | None, patch: pytest.MonkeyPatch, caplog: Any) -> str:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(logger, "propagate", True)
    if capabilities is None:
        patch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        patch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dwrl_fast"):
        compute = Compute.resolve(dtype)
    assert compute.float32 == (dtype != "bf16")
    return caplog.text


@pytest.mark.parametrize("without", [X86, NEON])
def test_bfloat16_without_its_instructions_is_said(
    without: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = resolved("bf16", without, monkeypatch, caplog)
    assert "This processor has no instructions for bfloat16" in text and "--dtype fp32" in text
    assert resolved("fp32", without, monkeypatch, caplog) == resolved("auto", without, monkeypatch, caplog) == ""


@pytest.mark.parametrize("having", [X86 | {"avx512_bf16": True}, X86 | {"amx_bf16": True}, NEON | {"bf16": True}])
def test_bfloat16_with_them_is_not(
    having: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolved("bf16", having, monkeypatch, caplog) == "" and multiplies_bfloat16() is True


def test_what_pytorch_does_not_say_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    text = resolved("bf16", None, monkeypatch, caplog)
    assert "PyTorch does not say whether this processor has instructions for bfloat16" in text


def test_the_capabilities_of_this_processor_have_the_names_that_are_read() -> None:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities:
        pytest.skip("this PyTorch does not name the processor's capabilities")
    known = {"x86_64": "avx512_bf16", "amd64": "avx512_bf16", "arm64": "bf16", "aarch64": "bf16"}
    name = known.get(str(capabilities["architecture"]).lower())
    assert name is None or name in capabilities
