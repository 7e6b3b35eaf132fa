"""Times the log-probabilities of all rows, and the gradients of a weighted sum of them.

    python -m bench.operators.linear_logprob --quick

On a GPU the shapes are those of real model heads in bfloat16.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Variant, main
from bench.operators.heads import DEVICE, SHAPES, drawn_head
from bench.operators.peers import SLOW, logprob_peers
from dwrl_fast import ops

GPU_SHAPES = [(8192, 2048, 151936, torch.bfloat16, True), (8192, 4096, 151936, torch.bfloat16, True)]


def variants(t: int, h: int, v: int, dtype: torch.dtype) -> list[Variant]:
    """The variants for T rows and a head [V, H]: ours, with and without gradients, and peers."""
    g, hidden, weight, targets = drawn_head(t, h, v, dtype)
    factor = torch.randn(t, generator=g, device=DEVICE)

    def through(logprob: Callable[[Tensor, Tensor, Tensor], Tensor]) -> object:
        return torch.autograd.grad((logprob(hidden, weight, targets) * factor).sum(), (hidden, weight))

    @torch.no_grad()
    def forward_only() -> object:
        return ops.linear_logprob(hidden, weight, targets)

    found = [
        Variant("dwrl_fast", partial(through, ops.linear_logprob), flops=8.0 * t * h * v),
        Variant("dwrl_fast, no gradient", forward_only, comparable=False, flops=2.0 * t * h * v),
    ]
    for name, logprob, why in logprob_peers():
        if DEVICE == "cuda" and name in SLOW:
            logprob, why = None, "it takes seconds; bench.operators.linear_policy_loss has it"
        found.append(Variant(name, partial(through, logprob) if logprob else None, why, name not in SLOW))
    return found


CASES = [
    Case(f"T {t}, H {h}, V {v}, {str(dtype)[6:]}", partial(variants, t, h, v, dtype), quick, unit=h * v)
    for t, h, v, dtype, quick in (GPU_SHAPES if DEVICE == "cuda" else SHAPES)
]

if __name__ == "__main__":
    main("operators.linear_logprob", __doc__, lambda args: CASES)
