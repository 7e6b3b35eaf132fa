"""Times the policy loss with the gradients of hidden states and head, compared with bare products and peers.

    python -m bench.operators.linear_policy_loss --quick

Of T rows all are trained, or some are untrained (like prompts and masked tokens); of the trained rows none or 5 % are
clipped. "bare products" is the lower bound: only the three products of the trained rows, in our chunks and buffers.

On a GPU the shapes are those of real model heads in bfloat16. The lower bound is then "three products", unchunked, with
any amount of memory, and differences are relative to the definition in float64.
"""

from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from bench.harness import Case, Row, Variant, main
from bench.operators.heads import DEVICE, SHAPES, drawn_head
from bench.operators.peers import SLOW, liger_grpo, logprob_peers, plain_logprob
from dwrl_fast import ops
from dwrl_fast.ops import oracle
from dwrl_fast.ops.oracle import policy_loss
from dwrl_fast.ops.products import Products

GPU_SHAPES = [  # T, H, V, share of untrained rows
    (8192, 4096, 151936, 0.0),
    (8192, 4096, 151936, 0.73),
    (8192, 2048, 151936, 0.0),  # Qwen2.5-3B
    (8192, 4096, 128256, 0.0),  # Llama-3-8B
    (16384, 2048, 248320, 0.0),  # from CCE's table
]
MOST_FLOORS, MOST_PEAK = 1.15, 6.1 * 2**30  # targets for the first GPU shape
PRODUCTS, ALL = "three products", slice(None)


def inputs(t: int, h: int, v: int, dtype: torch.dtype, untrained: float, clipped: float) -> tuple[Tensor, ...]:
    """Hidden states [T, H], weight [V, H], targets, old log-probs, advantages and token weights, [T] each.

    untrained: the share of rows whose weight is 0. clipped: the share whose ratio is outside the clip range.
    """
    g, hidden, weight, targets = drawn_head(t, h, v, dtype)
    old = ops.linear_logprob(hidden.detach(), weight.detach(), targets)
    advantage = torch.randn(t, generator=g, device=DEVICE)
    outside = torch.rand(t, generator=g, device=DEVICE) < clipped
    old = torch.where(outside, old - advantage.sign(), old)
    token_weight = (torch.rand(t, generator=g, device=DEVICE) >= untrained).float() / t
    return hidden, weight, targets, old, advantage, token_weight


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """dHidden [T, H] and dWeight [V, H]."""
    return torch.autograd.grad(loss, (hidden, weight))


@torch.no_grad()
def bare_products(hidden: Tensor, weight: Tensor, trained: Tensor) -> object:
    """Three products of the `trained` rows with our chunks and buffers, without the row functions."""
    products = Products(hidden, weight, None, (True, True, False))
    for index in products.split(trained):
        some = hidden[index]
        for _ in products.chunks(some):
            pass
        products.backward(some, index, torch.ones_like(index, dtype=torch.bool))
    return products.gradients(wide_weight=True)


def whole_products(hidden: Tensor, weight: Tensor, trained: Tensor) -> Callable[[], object]:
    """Logits, dHidden and dWeight of the rows `trained`, three products in the inputs' dtype, of random factors."""
    some, head = hidden.detach()[trained], weight.detach()
    d_logits = torch.randn(len(some), len(weight), device=DEVICE, dtype=weight.dtype) / len(weight)
    return lambda: (some @ head.t(), d_logits @ head, d_logits.t() @ some)


def exact(x: tuple[Tensor, ...], rows: int = 1024) -> tuple[Tensor, ...]:
    """dHidden and dWeight of the definition in float64, a few rows at a time, rounded to float32."""
    hidden, weight = (y.detach().double().requires_grad_() for y in x[:2])
    d_hidden, d_weight = [], torch.zeros_like(weight)
    for each in zip(hidden.split(rows), *(y.split(rows) for y in x[2:]), strict=True):
        some = each[0].detach().requires_grad_()
        loss = oracle.linear_policy_loss(some, weight, *each[1:]).loss
        part, whole = gradients(loss, some, weight)
        d_hidden.append(part)
        d_weight += whole
    return torch.cat(d_hidden).float(), d_weight.float()


def variants(
    t: int, h: int, v: int, dtype: torch.dtype, untrained: float, clipped: float, gpu: bool = False
) -> list[Variant]:
    """The variants: ours, bare products, and peers. gpu: with a float64 reference and more peers."""
    x = inputs(t, h, v, dtype, untrained, clipped)
    hidden, weight, targets, old, advantage, token_weight = x
    trained = token_weight.nonzero().squeeze(-1)

    def through(logprob: Callable[[Tensor, Tensor, Tensor], Tensor], rows: Tensor | slice = ALL) -> object:
        found = logprob(hidden[rows], weight, targets[rows]).float()
        loss = policy_loss(found, old[rows], advantage[rows], token_weight[rows]).loss
        return gradients(loss, hidden, weight)

    variant = partial(Variant, flops=6.0 * len(trained) * h * v)
    counted = {"inputs MB": (hidden.nbytes + weight.nbytes) / 1e6}
    found = [
        variant("dwrl_fast", lambda: gradients(ops.linear_policy_loss(*x).loss, hidden, weight), counters=counted),
        variant("bare products", partial(bare_products, hidden, weight, trained), comparable=False),
        variant("plain PyTorch, trained rows", lambda: through(plain_logprob, token_weight.nonzero().squeeze(-1))),
    ]
    if gpu:
        found.insert(0, Variant("float64", lambda: exact(x), reference=True))
        found.append(variant(PRODUCTS, whole_products(hidden, weight, trained), comparable=False))
    for name, logprob, why in logprob_peers():
        if gpu and name in SLOW and h > 2048:
            logprob, why = None, "it takes seconds: only at H 2048"
        found.append(variant(name, partial(through, logprob) if logprob else None, why, gpu or name not in SLOW))
    for compiled in (False, True)[: 1 + gpu]:
        grpo = partial(liger_grpo, compiled=compiled)
        name = "Liger fused_linear_grpo" + ", compiled" * compiled
        found.append(variant(name, lambda grpo=grpo: gradients(grpo(*x), hidden, weight)))  # type: ignore[misc]
    return found


def case(
    t: int, h: int, v: int, dtype: torch.dtype, quick: bool, untrained: float = 0.25, clipped: float = 0.05,
    gpu: bool = False,
) -> Case:  # fmt: skip
    """The case of these shapes; untrained and clipped as `inputs` takes them."""
    return Case(
        f"T {t}, H {h}, V {v}, {str(dtype)[6:]}, {untrained:.0%} untrained, {clipped:.0%} clipped",
        partial(variants, t, h, v, dtype, untrained, clipped, gpu),
        quick,
        unit=h * v,
        floor=PRODUCTS if gpu else "",
    )


def cases() -> list[Case]:
    """All cases for the current device."""
    if DEVICE == "cuda":
        return [case(t, h, v, torch.bfloat16, True, untrained, 0, gpu=True) for t, h, v, untrained in GPU_SHAPES]
    return [case(*shape) for shape in SHAPES] + [case(*shape, untrained=0, clipped=0) for shape in SHAPES]


def summary(rows: list[Row], console: Console) -> None:
    """Print the targets for a GPU next to the measurements."""
    for name in dict.fromkeys(row.case for row in rows if row.floors):
        some = {row.variant: row for row in rows if row.case == name and row.seconds_median}
        if not (ours := some.pop("dwrl_fast", None)):
            continue
        peers = [r for n, r in some.items() if n not in ("bare products", PRODUCTS) and not r.disagrees]
        nearest = min(peers, key=lambda r: r.seconds_median or 0, default=None)
        console.print(f"{name}\n  times of the three products: {ours.floors:.3f}, asked at most {MOST_FLOORS}")
        peak = (ours.peak_bytes or 0) + ours.counters.get("inputs MB", 0.0) * 1e6
        console.print(f"  peak with the inputs: {peak / 2**30:.2f} GiB, asked at most {MOST_PEAK / 2**30:.2f} GiB")
        if nearest and nearest.seconds_median and ours.seconds_median:
            ahead = nearest.seconds_median / ours.seconds_median
            console.print(
                f"  fastest peer of {len(peers)}: {nearest.variant}, {ahead:.2f} times our time, asked above 1"
            )


if __name__ == "__main__":
    main("operators.linear_policy_loss", __doc__, lambda args: cases(), summary)
