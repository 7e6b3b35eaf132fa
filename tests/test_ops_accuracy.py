"""Every operator and its gradients against float64, within the bounds that follow from the arithmetic."""

from typing import Any

import pytest
import torch
from ops_cases import SHAPES, assert_accurate, every_operator, inputs, results, small_chunks

from dwrl_fast.ops import extension

pytestmark = pytest.mark.skipif(extension.problem() is not None, reason="the C++ operators are not built")

HEADS: list[dict[str, float]] = [{}, {"temperature": 0.7}, {"softcap": 20.0}, {"softcap": 20.0, "temperature": 1.3}]


def check(operator: str, options: dict, shape: tuple, dtype: torch.dtype = torch.float32, **how: Any) -> None:
    for seed in range(3):
        x = inputs(shape, dtype, seed=seed, **how)
        whole = results(operator, x, "cpu", **options)
        with small_chunks():
            assert_accurate(operator, x, whole, results(operator, x, "cpu", **options), **options)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(operator: Any, options: Any, dtype: Any, shape: Any) -> None:
    check(operator, options, shape, dtype)


@every_operator
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_heads(operator: Any, options: Any, head: Any, strided: Any) -> None:
    check(operator, options, (61, 16, 1003), size=8, strided=strided, bias=not strided, **head)


@every_operator
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7}, {"softcap": 30.0}], ids=str)
def test_huge_logits(operator: Any, options: Any, head: Any) -> None:
    """Logits of magnitude 1e4. float32 resolves them to 1e-3; cancellation and overflow must not add to this error."""
    check(operator, options, (200, 16, 517), size=1e4, **head)


@every_operator
def test_float64(operator: Any, options: Any) -> None:
    """In float64, the same kernels agree with the definition up to rounding."""
    x = inputs((29, 16, 1003), torch.float64, size=4, softcap=20.0)
    got, want = results(operator, x, "cpu", **options), results(operator, x, "reference", **options)
    for name, y in want.items():
        torch.testing.assert_close(got[name], y, rtol=1e-12, atol=1e-13, equal_nan=True, msg=name)
