"""`python -m bench.linear_policy_loss`: loss and gradients of hidden states and head, bare products and peers.

T rows: all trained, or a quarter untrained, as prompts and masked tokens are, and 5 % of the rest clipped. "bare
products" is the floor: three products of the trained rows in our chunks and buffers, and nothing else.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness import Case, Variant, main
from bench.peers import SLOW, liger_grpo, logprob_peers, plain_logprob
from dwrl_fast import ops
from dwrl_fast.ops.products import Products
from dwrl_fast.reference import policy_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # T, H, V, dtype, quick
    (512, 64, 8192, torch.float32, True),
    (2048, 64, 32768, torch.float32, False),
    (2048, 128, 32768, torch.float32, False),
    (2048, 512, 32003, torch.float32, False),
    (2048, 896, 151936, torch.float32, False),
    (2048, 896, 151936, torch.bfloat16, False),
]


def inputs(t: int, h: int, v: int, dtype: torch.dtype, untrained: float, clipped: float) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(t, h, generator=g).to(DEVICE, dtype)
    weight = (torch.randn(v, h, generator=g) / h**0.5).to(DEVICE, dtype)
    targets = torch.randint(v, (t,), generator=g).to(DEVICE)
    old = ops.linear_logprob(hidden, weight, targets)
    advantage = torch.randn(t, generator=g).to(DEVICE)
    outside = (torch.rand(t, generator=g) < clipped).to(DEVICE)
    old = torch.where(outside, old - advantage.sign(), old)
    token_weight = (torch.rand(t, generator=g) >= untrained).float().to(DEVICE) / t
    return hidden.requires_grad_(), weight.requires_grad_(), targets, old, advantage, token_weight


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (hidden, weight))


def bare_products(hidden: Tensor, weight: Tensor, token_weight: Tensor) -> Callable[[], object]:
    """Three products of the trained rows through the very chunks and buffers of ours, without any row work."""
    trained = token_weight.nonzero().squeeze(-1)

    def run() -> object:
        with torch.no_grad():
            products = Products(hidden, weight, None, (True, True, False))
            for index in trained.split(products.chunk):
                some = hidden[index]
                logits = products.logits(some)
                gradient = products.gradient_buffer(logits)
                products.backward(gradient, some, index, torch.ones_like(index, dtype=torch.bool))
            return products.gradients()

    return run


def variants(t: int, h: int, v: int, dtype: torch.dtype, untrained: float, clipped: float) -> list[Variant]:
    x = inputs(t, h, v, dtype, untrained, clipped)
    hidden, weight, targets, old, advantage, token_weight = x

    def through(
        logprob: Callable[[Tensor, Tensor, Tensor], Tensor], trained_only: bool = False
    ) -> Callable[[], object]:
        def run() -> object:
            rows = token_weight.nonzero().squeeze(-1) if trained_only else slice(None)
            found = logprob(hidden[rows], weight, targets[rows]).float()
            loss = policy_loss(found, old[rows], advantage[rows], token_weight[rows]).loss
            return gradients(loss, hidden, weight)

        return run

    found = [
        Variant("dwrl_fast", lambda: gradients(ops.linear_policy_loss(*x).loss, hidden, weight)),
        Variant("bare products", bare_products(hidden, weight, token_weight), comparable=False),
        Variant("plain PyTorch, trained rows", through(plain_logprob, trained_only=True)),
    ]
    for name, logprob, why in logprob_peers(DEVICE):
        found.append(Variant(name, through(logprob) if logprob else None, why, name not in SLOW))
    found.append(Variant("Liger fused_linear_grpo", lambda: gradients(liger_grpo(*x), hidden, weight)))
    return found


def case(
    t: int, h: int, v: int, dtype: torch.dtype, quick: bool, untrained: float = 0.25, clipped: float = 0.05
) -> Case:
    name = f"T {t}, H {h}, V {v}, {str(dtype)[6:]}, {untrained:.0%} untrained, {clipped:.0%} clipped"
    return Case(name, lambda: variants(t, h, v, dtype, untrained, clipped), quick, unit=h * v)


CASES = [case(*shape) for shape in SHAPES] + [case(*shape, untrained=0, clipped=0) for shape in SHAPES]

if __name__ == "__main__":
    main("linear_policy_loss", CASES)
