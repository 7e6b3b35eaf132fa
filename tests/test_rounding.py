"""The error bounds of the operators' tests hold for any order of a sum, and wrong results exceed them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_bounds import bounds
from ops_cases import assert_accurate, every_operator, inputs, results
from rounding import Rounded, assert_within
from torch import Tensor

SHAPE = (23, 17, 101)


def pairwise(x: Tensor) -> Tensor:
    return x if len(x) == 1 else pairwise(x[: len(x) // 2]) + pairwise(x[len(x) // 2 :])


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "one by one": lambda x: x.cumsum(0)[-1:],
    "from the end": lambda x: x.flip(0).cumsum(0)[-1:],
    "the largest first": lambda x: x.sort(descending=True).values.cumsum(0)[-1:],
    "pairs": pairwise,
    "eight lanes": lambda x: x[: len(x) // 8 * 8].unflatten(0, (-1, 8)).cumsum(0)[-1].cumsum(0)[-1:],
}


@pytest.mark.parametrize("signs", [False, True], ids=["alike", "both signs"])
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_a_sum(order: str, signs: bool) -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(32000, generator=g).exp() * (torch.randn(32000, generator=g).sign() if signs else 1)
        bound = Rounded.given(x, torch.float32).sum(0)[None]
        assert_within({"sum": ORDERS[order](x)}, {"sum": bound})
        assert bound.error < 1e-4 * x.abs().sum()


@every_operator
@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)], ids=str)
def test_one_number_that_is_off(operator: str, options: dict[str, Any], dtype: torch.dtype, part: float) -> None:
    x = inputs(SHAPE, dtype)
    limits = bounds(operator, x, **options)
    for name, bound in limits.items():
        if (name, dtype) == ("loss", torch.bfloat16):
            continue  # its terms cancel, so the bound is as large as the sum
        found = {k: y.value.clone() for k, y in limits.items()}
        assert_within(found, limits)
        flat = found[name].view(-1)
        flat[flat.nan_to_num().abs().argmax()] *= 1 + part
        with pytest.raises(AssertionError, match=f"{name}: .* times the bound; 1 of {bound.value.numel()} are off"):
            assert_within(found, limits)


def without(index: int) -> Callable[[Tensor], Tensor]:
    return lambda y: y.index_fill(0, torch.tensor(index), 0).detach().requires_grad_(y.requires_grad)


FAULTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "a weight rounded to bfloat16": {"weight": lambda y: y.detach().bfloat16().float().requires_grad_()},
    "a column without its bias": {"bias": without(7)},
    "a row left out": {"token_weight": without(2), "advantage": without(2)},
    "a temperature and a soft-cap": {"head": lambda head: head | {"temperature": 1.001, "softcap": 500.0}},
}


@every_operator
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(operator: str, options: dict[str, Any], fault: str) -> None:
    x = inputs(SHAPE, torch.float32)
    found = results(operator, x | {k: change(x[k]) for k, change in FAULTS[fault].items()}, "reference", **options)
    with pytest.raises(AssertionError, match=r"times the bound|not a number elsewhere"):
        assert_accurate(operator, x, found, **options)
