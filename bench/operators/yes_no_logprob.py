"""Times the score of B sequences and the gradient of their sum, compared with plain PyTorch.

python -m bench.operators.yes_no_logprob --quick
"""

from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import Case, Variant, main
from bench.operators.heads import DEVICE, drawn_head
from dwrl_fast import ops

CPU_SHAPES = [(64, 64, 8192, True), (64, 896, 151936, True), (256, 896, 151936, False)]  # B, H, V, quick
SHAPES = [(256, 4096, 151936, True)] if DEVICE == "cuda" else CPU_SHAPES
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
YES, NO = 7, 11


def variants(b: int, h: int, v: int, normalization: str) -> list[Variant]:
    """The variants for B hidden states and a head [V, H]: ours and plain PyTorch."""
    _, hidden, weight, _ = drawn_head(b, h, v, DTYPE)

    def plain() -> object:
        logits = F.linear(hidden, weight).float()
        over = logits if normalization == "vocab" else logits[:, [YES, NO]]
        score = over.log_softmax(-1)[:, YES if normalization == "vocab" else 0]
        return torch.autograd.grad(score.sum(), (hidden, weight))

    def ours() -> object:
        score = ops.yes_no_logprob(hidden, weight, YES, NO, normalization=normalization)
        return torch.autograd.grad(score.sum(), (hidden, weight))

    return [Variant("dwrl_fast", ours), Variant("plain PyTorch", plain)]


CASES = [
    Case(f"B {b}, H {h}, V {v}, {n}", partial(variants, b, h, v, n), quick, unit=h * v)
    for b, h, v, quick in SHAPES
    for n in ("vocab", "yes_no")
]

if __name__ == "__main__":
    main("operators.yes_no_logprob", __doc__, lambda args: CASES)
