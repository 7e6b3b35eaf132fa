"""Chooses the backend of an operator, and holds the checks that all backends share."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from dwrl_fast.errors import UserError
from dwrl_fast.log import info_once, warn_once
from dwrl_fast.ops import extension

Result = TypeVar("Result")
BACKENDS = ("auto", "reference", "cpu", "triton")


def choose_backend(backend: str, operator: str, x: Tensor) -> str:
    """The name of the backend for `operator` on x. The choice of "auto" is logged once.

    Raises UserError if the backend is unknown, or is named but cannot run, and with every backend if the C++ operators
    are compiled for another PyTorch.
    """
    return _choose(backend, operator, x.device.type, x.dtype)


@torch.compiler.assume_constant_result  # decided while tracing
def _choose(backend: str, operator: str, device: str, dtype: torch.dtype) -> str:
    if backend not in BACKENDS:
        raise UserError(f"{operator}: backend is {backend!r}; it can be {', '.join(BACKENDS)}")
    other = extension.refusal()
    if other is not None:
        raise UserError(f"{operator}: {other}")
    if backend != "auto":
        problem = _problem(backend, device, dtype)
        if problem:
            raise UserError(f"{operator}: backend {backend!r} cannot run: {problem}")
        return backend
    natural = "cpu" if device == "cpu" else "triton"
    problem = _problem(natural, device, dtype)
    if problem and natural == "cpu":
        warn_once(problem)  # once for all operators: the missing part, with the command that builds it
        problem = "its C++ operators are missing"
    chosen = "reference" if problem else natural
    reason = f" ({extension.instruction_set()})" if chosen == "cpu" else ""
    if problem:
        reason = f" ({natural} cannot run: {problem})"
    say = warn_once if problem else info_once
    say(f"{operator} on {device} in {dtype}: backend {chosen}{reason}")
    return chosen


def _problem(backend: str, device: str, dtype: torch.dtype) -> str | None:
    if backend == "cpu":
        return f"the tensors are on {device}" if device != "cpu" else extension.problem()
    if backend == "triton":
        if dtype == torch.float64:
            return "its kernels compute in float32; float64 takes backend 'reference'"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if device != "cuda" and not interpreted():
            return f"the tensors are on {device} (TRITON_INTERPRET=1 runs the kernels there, slowly, for tests)"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its slow CPU interpreter, for tests (TRITON_INTERPRET=1)."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def row_pass(backend: str) -> ModuleType:
    """The module with a backend's row functions: policy_rows, logprob_rows, logprob_rows_grad, policy_loss_rows."""
    name = "dwrl_fast.ops.cpu" if backend == "cpu" else "dwrl_fast.kernels.rows"
    return importlib.import_module(name)


def check_head(operator: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """UserError unless hidden is [T, H], weight [V, H] and bias [V], with compatible dtypes and devices."""
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        advice = (
            ": float16 gradients under- and overflow; use bfloat16, in torch.autocast too"
            if hidden.dtype == torch.float16
            else ""
        )
        raise UserError(f"{operator}: hidden is {hidden.dtype}; it can be float32, bfloat16 or float64{advice}")
    if hidden.dim() != 2:
        raise UserError(f"{operator}: hidden is {list(hidden.shape)}; expected [T, H] (flatten the batch)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise UserError(f"{operator}: weight is {list(weight.shape)}; expected [V, H = {hidden.shape[1]}]")
    if weight.shape[0] == 0:
        raise UserError(f"{operator}: weight is {list(weight.shape)}; expected [V, H] with a vocabulary V above 0")
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise UserError(f"{operator}: weight is {weight.dtype}; expected hidden's {hidden.dtype}, or a float32 master")
    if weight.device != hidden.device:
        raise UserError(f"{operator}: weight is on {weight.device}, hidden on {hidden.device}; put both on one device")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"{operator}: bias is {list(bias.shape)}; expected [V = {weight.shape[0]}]")
    if bias is not None and bias.dtype not in (hidden.dtype, weight.dtype, torch.float32):
        raise UserError(f"{operator}: bias is {bias.dtype}; expected hidden's {hidden.dtype}, or float32")
    if bias is not None and bias.device != hidden.device:
        raise UserError(f"{operator}: bias is on {bias.device}, hidden on {hidden.device}; put both on one device")


def check_tokens(operator: str, like: Tensor, **tensors: Tensor | None) -> None:
    """UserError unless every tensor is [T], on the device of like [T, ...], and targets is int64."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.shape != like.shape[:1]:
            raise UserError(f"{operator}: {name} is {list(x.shape)}; expected [T = {like.shape[0]}]")
        if x.device != like.device:
            raise UserError(f"{operator}: {name} is on {x.device}; the other tensors are on {like.device}")
        if name == "targets" and x.dtype != torch.int64:
            raise UserError(f"{operator}: targets is {x.dtype}; expected int64 token ids")


def check_scaling(operator: str, temperature: float, softcap: float | None) -> None:
    """UserError unless temperature and softcap are finite and above 0; softcap may be None."""
    if not 0 < temperature < math.inf:
        raise UserError(f"{operator}: temperature is {temperature}; it must be finite and above 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise UserError(f"{operator}: softcap is {softcap}; it must be finite and above 0, or None for no soft-cap")


def check_targets(operator: str, targets: Tensor, vocabulary: int) -> None:
    """Raise UserError if a target is outside the vocabulary. Only on the CPU: elsewhere the check would wait for the
    device, and the kernels return NaN for such rows.
    """
    if targets.device.type == "cpu" and targets.numel() and not 0 <= targets.min() <= targets.max() < vocabulary:
        raise UserError(
            f"{operator}: targets hold {int(targets.min())} to {int(targets.max())}; expected 0 to {vocabulary - 1}"
            " (a padding row takes part unless its token_weight is 0)"
        )


def autocast(hidden: Tensor) -> Tensor:
    """hidden in the dtype of torch.autocast if it is active. The weight and its gradient keep their dtype."""
    kind = hidden.device.type
    if hidden.is_floating_point() and hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden


def without_autocast(body: Callable[..., Result]) -> Callable[..., Result]:
    """`body(tensor, ...)` without torch.autocast, in forward and backward; `autocast` has already chosen the dtype."""

    @functools.wraps(body)
    def run(first: Tensor, *rest: object, **options: object) -> Result:
        with torch.autocast(first.device.type, enabled=False):
            return body(first, *rest, **options)

    return run
