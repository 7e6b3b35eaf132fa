"""Trees and inputs for the tests of tree_attention."""

from typing import Any, NamedTuple

import torch
from rounding import Bounds, Rounded, assert_within, product
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.ops import oracle
from dwrl_fast.ops.products import wide


class Plan(NamedTuple):
    start: Tensor
    stop: Tensor
    parent: Tensor


def plan_of(nodes: list[tuple[int, int]]) -> Plan:
    """From (tokens, parent) of each node, in depth-first order."""
    sizes, parent = torch.tensor(nodes, dtype=torch.int64).reshape(-1, 2).unbind(1)
    stop = sizes.cumsum(0)
    return Plan(stop - sizes, stop, parent.contiguous())


def drawn(nodes: int, longest: int, rise: float, seed: int = 0) -> Plan:
    """A random forest: after each node the path is left upwards with probability `rise`, again and again."""
    g = torch.Generator().manual_seed(seed)
    path: list[int] = []
    found = []
    for m in range(nodes):
        while path and torch.rand((), generator=g) < rise:
            path.pop()
        found.append((int(torch.randint(1, longest + 1, (), generator=g)), path[-1] if path else -1))
        path.append(m)
    return plan_of(found)


GROUP = [(70, -1), (33, 0), (20, 1), (9, 1), (41, 1), (65, 0), (1, 5), (30, 5)]  # x, y+ and thoughts, y- and thoughts
TREES = {
    "one token": plan_of([(1, -1)]),
    "one sequence": plan_of([(150, -1)]),
    "a group": plan_of(GROUP),
    "one-token nodes": drawn(90, 1, 0.4),
    "deep chain": plan_of([(3, m - 1) for m in range(40)]),
    "many roots": drawn(40, 12, 0.9),
    "long roots": plan_of([(70, -1), (65, -1), (5, 1), (130, -1), (64, 3), (64, 3), (1, -1)]),
    "forest": drawn(30, 25, 0.45),
    "empty nodes": plan_of([(0, -1), (7, 0), (0, 0), (5, 2), (3, -1), (0, -1)]),
}
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"window": 13}, {"window": 70, "softcap": 5.0, "scale": 0.3}]


def inputs(plan: Plan, heads: tuple[int, int], d: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    u = int(plan.stop[-1]) if len(plan.stop) else 0
    x = {
        n: torch.randn(u, h, d, generator=g).to(dtype)
        for n, h in zip("qkv", (heads[0], heads[1], heads[1]), strict=True)
    }
    return {n: y.requires_grad_() for n, y in x.items()} | {"grad": torch.randn(u, heads[0], d, generator=g).to(dtype)}


def results(x: dict[str, Tensor], plan: Plan, backend: str = "cpu", **options: Any) -> dict[str, Tensor]:
    out = ops.tree_attention(x["q"], x["k"], x["v"], plan, backend=backend, **options)
    gradients = torch.autograd.grad(out, (x["q"], x["k"], x["v"]), x["grad"])
    return {"out": out.detach()} | dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))


def double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: y.detach().double().requires_grad_(y.requires_grad) for n, y in x.items()}


def attended(x: dict[str, Tensor], plan: Plan, **options: Any) -> tuple[Rounded, Rounded, Rounded, Rounded, Rounded]:
    """[Hq, U, D] what the definition gives, with the error that each number may have; and by heads the keys and values,
    the weights, and the slope of the logits.

    q's dtype enters at the logits (of plain PyTorch), at the weights where they meet v (of CUDA's kernels), and at what
    leaves. All between is wide.
    """
    narrow, group = x["q"].dtype, x["q"].shape[1] // x["k"].shape[1]
    scale = options.get("scale") or x["q"].shape[-1] ** -0.5
    q, k, v = (Rounded.given(x[n].transpose(0, 1), wide(narrow)) for n in "qkv")
    k, v = (y.moved(lambda z: z.repeat_interleave(group, 0)) for y in (k, v))
    logits = product(q, k.moved(lambda z: z.mT), narrow, pieces=False) * scale
    slope = logits * 0 + 1
    if options.get("softcap"):
        u = (logits * (1 / options["softcap"])).tanh()
        logits, slope = u * options["softcap"], slope - u * u
    hidden = ~oracle.tree_mask(plan, options.get("window"), q.value.device)
    logits.value.masked_fill_(hidden, -1e4)
    logits.error.masked_fill_(hidden, 0)
    p = logits.log_softmax().exp()
    return product(p.narrowed(narrow), v, narrow), k, v, p, slope


def bounds(x: dict[str, Tensor], plan: Plan, **options: Any) -> Bounds:
    """What `results` finds, with the error that each number may have: the definition and its derivative, by heads.

    Of the derivative, q's dtype also enters at the gradients of logits and weights where they meet q, k and out.
    """
    narrow, keys = x["q"].dtype, x["k"].shape[1]
    scale = options.get("scale") or x["q"].shape[-1] ** -0.5
    out, k, v, p, slope = attended(x, plan, **options)
    q, grad = (Rounded.given(x[n].transpose(0, 1), wide(narrow)) for n in ("q", "grad"))
    d_p = product(grad, v.moved(lambda z: z.mT), narrow, pieces=False)
    d_logits = (p * (d_p - (grad * out).sum(-1)[..., None]) * slope).narrowed(narrow) * scale
    back = d_logits.moved(lambda z: z.mT), p.narrowed(narrow).moved(lambda z: z.mT)
    d_k, d_v = (
        product(y, z, narrow).moved(lambda w: w.unflatten(0, (keys, -1)).sum(1))
        for y, z in zip(back, (q, grad), strict=True)
    )
    found = {"out": out, "d_q": product(d_logits, k, narrow), "d_k": d_k, "d_v": d_v}
    return {n: y.moved(lambda z: z.transpose(0, 1)) for n, y in found.items()}


def assert_accurate(x: dict[str, Tensor], plan: Plan, found: dict[str, Tensor], **options: Any) -> None:
    """`found`, and plain PyTorch in the same dtype, within the bounds that follow from the arithmetic."""
    plain, limits = results(x, plan, "reference", **options), bounds(x, plan, **options)
    for name, exact in results(double(x), plan, "reference", **options).items():
        message = f"{name}: the bounds are those of another value"
        torch.testing.assert_close(limits[name].value, exact, rtol=1e-9, atol=1e-9, msg=message)
    for each in (plain, found):
        assert {k: (y.shape, y.dtype) for k, y in each.items()} == {k: (y.shape, y.dtype) for k, y in plain.items()}
        assert_within(each, limits)
