"""Bounds on the rounding error of floating-point results: running error analysis (Wilkinson 1963; Higham, ch. 3)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

Operand = Union["Rounded", Tensor, float]


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to dtype: to nearest, but Triton's interpreter cuts bfloat16 off."""
    cuts_off = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.finfo(dtype).eps * (1 if cuts_off else 0.5)


def growth(terms: int) -> float:
    """The error bound of a sum of `terms` terms, in units of one rounding times the sum of magnitudes.

    In any order it is at most the number of terms. Random rounding errors grow as its square root: more than 6 times
    the root has a probability below 1e-7 (Higham and Mary 2019, Theorem 2.4).
    """
    return min(terms, 6 * terms**0.5)


@dataclass
class Rounded:
    """A float64 `value`, and a bound `error` for arithmetic with roundings of relative size u. Every operation
    propagates the errors of its operands and adds its own: u times its result, or times the magnitudes of its terms for
    sums. The bound does not depend on instruction set, blocking or number of threads.
    """

    value: Tensor
    error: Tensor
    u: float

    @classmethod
    def given(cls, value: Tensor, dtype: torch.dtype) -> "Rounded":
        """An exact value at the start of a computation in dtype."""
        return cls(value.detach().double(), torch.zeros_like(value, dtype=torch.float64), unit(dtype))

    def _new(self, value: Tensor, error: Tensor) -> "Rounded":
        return Rounded(value, error + self.u * value.abs(), self.u)

    def _of(self, other: Operand) -> "Rounded":
        if isinstance(other, Rounded):
            return other
        value = torch.as_tensor(other, dtype=torch.float64, device=self.value.device)
        return Rounded(value, torch.zeros_like(value), self.u)

    def __add__(self, other: Operand) -> "Rounded":
        b = self._of(other)
        return self._new(self.value + b.value, self.error + b.error)

    def __sub__(self, other: Operand) -> "Rounded":
        b = self._of(other)
        return self._new(self.value - b.value, self.error + b.error)

    def __mul__(self, other: Operand) -> "Rounded":
        b = self._of(other)
        error = self.value.abs() * b.error + self.error * (b.value.abs() + b.error)
        return self._new(self.value * b.value, error)

    def __matmul__(self, other: Operand) -> "Rounded":
        b = self._of(other)
        sums = self.u * growth(self.value.shape[-1]) * self.value.abs()
        error = (self.error + sums) @ b.value.abs() + (self.value.abs() + self.error) @ b.error
        return self._new(self.value @ b.value, error)

    def __getitem__(self, index: Any) -> "Rounded":
        return self.moved(lambda x: x[index])

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Rounded":
        """The same elements, rearranged."""
        return Rounded(move(self.value), move(self.error), self.u)

    def sum(self, dim: int) -> "Rounded":
        sums = self.u * growth(self.value.shape[dim]) * self.value.abs()
        return self._new(self.value.sum(dim), (self.error + sums).sum(dim))

    # A library function is accurate to 4 units in the last place, of 2 u each.
    def exp(self) -> "Rounded":
        value = self.value.exp()
        scaled = self.error + self.u * self.value.abs()  # to base 2
        return self._new(value, value * (scaled.expm1() + 8 * self.u))

    def tanh(self) -> "Rounded":
        value = self.value.tanh()
        return self._new(value, (1 - value.square()) * self.error + 8 * self.u * value.abs())

    def log_softmax(self) -> "Rounded":
        """Over the last dimension, from the differences to the largest; the error of the logarithm is the sum's."""
        below = self - self.value.amax(-1, keepdim=True)
        each = below.exp()
        total = each.sum(-1)[..., None]
        return below - Rounded(total.value.log(), total.error / total.value, self.u)

    def narrowed(self, dtype: torch.dtype) -> "Rounded":
        return Rounded(self.value, self.error + unit(dtype) * (self.error + self.value.abs()), self.u)


def product(a: Rounded, b: Operand, dtype: torch.dtype, pieces: bool = True) -> Rounded:
    """a @ b, rounded to dtype; with `pieces` it may also be a sum of rounded products."""
    whole = (a @ b).narrowed(dtype)
    if pieces:
        whole.error += unit(dtype) * (a.value.abs() @ a._of(b).value.abs())
    return whole


Bounds = dict[str, Rounded]
UNDERFLOW = 1e-30  # values that underflow in float32 may be missing


def assert_within(found: dict[str, Tensor], bounds: Bounds) -> None:
    """Assert that every number of `found` is within its bound, and that both have NaN at the same places."""
    assert found.keys() == bounds.keys()
    for name, bound in bounds.items():
        got = found[name].double()
        assert torch.equal(got.isnan(), bound.value.isnan()), f"{name}: not a number elsewhere"
        excess = ((got - bound.value).abs() / bound.error.clamp_min(UNDERFLOW)).nan_to_num()
        worst = excess.amax().item()
        assert worst <= 1, f"{name}: {worst:.3g} times the bound; {(excess > 1).sum()} of {excess.numel()} are off"
