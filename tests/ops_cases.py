"""Inputs for the operators' tests, and the outputs and gradients of every operator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ops_bounds import bounds
from rounding import assert_within
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.ops import oracle, products

# Chosen to be irregular: one row, fewer columns than a vector, not multiples of a vector or a block, the remainder of a
# real vocabulary.
SHAPES = [(1, 1, 2), (7, 5, 3), (23, 17, 101), (34, 16, 4099), (13, 8, 32003)]

OPERATORS: list[tuple[str, dict[str, Any]]] = [
    ("linear_policy_loss", {}),
    ("linear_policy_loss", {"beta": 0.1, "clip_low": 0.4, "clip_high": 0.6}),
    ("linear_logprob", {}),
    ("yes_no_logprob", {"normalization": "vocab"}),
    ("yes_no_logprob", {"normalization": "yes_no"}),
]
every_operator = pytest.mark.parametrize(
    ("operator", "options"), OPERATORS, ids=[name + "".join(f"-{v}" for v in how.values()) for name, how in OPERATORS]
)


@contextmanager
def small_chunks(rows: int = 8) -> Iterator[None]:
    """A context with small chunks, so that every pass has many."""
    before = products.MIN_ROWS, dict(products.CHUNK_BYTES)
    products.MIN_ROWS = rows
    products.CHUNK_BYTES.update(cpu=1, cuda=1)
    try:
        yield
    finally:
        products.MIN_ROWS = before[0]
        products.CHUNK_BYTES.update(before[1])


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, *, size: float = 1.0, strided: bool = False, bias: bool = True,
    seed: int = 0, **head: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the linear operators. `size` is the logits' magnitude; `head` holds temperature and softcap."""
    t, h, v = shape
    g = torch.Generator().manual_seed(seed)
    draw = lambda *n: torch.randn(*n, generator=g)  # noqa: E731
    hidden = draw(t, 2 * h)[:, ::2] if strided else draw(t, h)
    weight = draw(h, v).t() if strided else draw(v, h)
    weight = weight * (size / h**0.5)
    x = {"hidden": hidden, "weight": weight, "bias": draw(v) if bias else None}
    x = {k: None if y is None else y.to(dtype).requires_grad_() for k, y in x.items()}
    targets = torch.randint(v, (t,), generator=g)
    double: dict[str, Any] = {k: wide(y) for k, y in x.items()}
    exact: Any = oracle.linear_logprob(targets=targets, **double, **head)
    # Ratios far from the clip boundaries (.6, .8, 1.2, 1.6), on both sides of each, so that rounding does not decide.
    log_ratio = torch.tensor([-0.6, -0.35, -0.1, 0.05, 0.4, 0.6])[torch.arange(t) % 6]
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    old = (exact.detach() - log_ratio).to(wide_dtype)
    advantage, token_weight = draw(t), torch.rand(t, generator=g)
    if t > 5:
        advantage[3], token_weight[5] = 0, 0
    return x | {
        "targets": targets,
        "old_logprob": old,
        "advantage": advantage.to(wide_dtype),
        "token_weight": token_weight.to(wide_dtype),
        "head": head,
    }


def on_device(x: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        k: y.detach().to(device).requires_grad_(y.requires_grad) if isinstance(y, Tensor) else y for k, y in x.items()
    }


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().double().requires_grad_(x.requires_grad)


def in_float64(x: dict[str, Any]) -> dict[str, Any]:
    return {k: wide(y) if isinstance(y, Tensor) and y.is_floating_point() else y for k, y in x.items()}


def results(operator: str, x: dict[str, Any], backend: str, **options: Any) -> dict[str, Tensor]:
    """The results of an operator, and the gradients of a fixed combination of them."""
    module: Any = oracle if backend == "reference" else ops
    how = {} if backend == "reference" else {"backend": backend}
    head = x["head"]
    a, w, old = x["advantage"], x["token_weight"], x["old_logprob"]
    if operator == "linear_policy_loss":
        ref = old + 0.1 if options.get("beta") else None
        r = module.linear_policy_loss(
            x["hidden"], x["weight"], x["targets"], old, a, w, bias=x["bias"], ref_logprob=ref, **head, **options, **how
        )
        out, total = {"loss": r.loss, "logprob": r.logprob, "stats": r.stats}, r.loss * 1.5
    elif operator == "linear_logprob":
        logprob, entropy = module.linear_logprob(
            x["hidden"], x["weight"], x["targets"], bias=x["bias"], return_entropy=True, **head, **how
        )
        out, total = {"logprob": logprob, "entropy": entropy}, (logprob * a + entropy * w).sum()
    else:
        cap = {"softcap": head["softcap"]} if "softcap" in head else {}
        labels = x["weight"].shape[0] - 1, 0
        score, mass = module.yes_no_logprob(
            x["hidden"], x["weight"], *labels, bias=x["bias"], return_mass=True, **cap, **options, **how
        )
        out, total = {"score": score, "mass": mass}, (score * a).sum()
    names = [k for k in ("hidden", "weight", "bias") if x[k] is not None]
    gradients = torch.autograd.grad(total, [x[k] for k in names])
    return {k: y.detach() for k, y in out.items()} | {f"d_{k}": g for k, g in zip(names, gradients, strict=True)}


def assert_accurate(operator: str, x: dict[str, Any], *found: dict[str, Tensor], **options: Any) -> None:
    """Each of `found`, and plain PyTorch on the CPU in the same dtype, within the bounds of `ops_bounds`."""
    direct = products._direct(x["hidden"])
    x = on_device(x, "cpu")
    plain, limits = results(operator, x, "reference", **options), bounds(operator, x, direct=direct, **options)
    for name, exact in results(operator, in_float64(x), "reference", **options).items():
        message = f"{name}: the bounds are those of another value"
        torch.testing.assert_close(limits[name].value, exact, rtol=1e-9, atol=1e-9, equal_nan=True, msg=message)
    for each in (*found, *([] if direct else [plain])):  # plain PyTorch rounds the logits
        assert {k: (y.shape, y.dtype) for k, y in each.items()} == {k: (y.shape, y.dtype) for k, y in plain.items()}
        assert_within({k: y.cpu() for k, y in each.items()}, limits)
