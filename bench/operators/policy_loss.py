"""Times the clipped loss from given log-probabilities with its gradient and statistics.

python -m bench.operators.policy_loss --quick
"""

import torch

from bench.harness import Case, Variant, main
from bench.operators.heads import DEVICE
from dwrl_fast import ops


def variants(t: int) -> list[Variant]:
    """Of `t` tokens: ours, and the definition."""
    g = torch.Generator().manual_seed(0)
    logprob = (-torch.rand(t, generator=g)).to(DEVICE).requires_grad_()
    old = logprob.detach() + 0.2 * torch.randn(t, generator=g).to(DEVICE)
    rest = torch.randn(t, generator=g).to(DEVICE), torch.rand(t, generator=g).to(DEVICE)

    def through(backend: str) -> object:
        return torch.autograd.grad(ops.policy_loss(logprob, old, *rest, backend=backend).loss, logprob)

    return [
        Variant("dwrl_fast", lambda: through("auto")),
        Variant("plain PyTorch", lambda: through("reference")),
    ]


CASES = [Case(f"T {t}", lambda t=t: variants(t)) for t in (1024, 65536, 1048576)]  # type: ignore[misc]

if __name__ == "__main__":
    main("operators.policy_loss", __doc__, lambda args: CASES)
