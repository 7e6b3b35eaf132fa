"""Random inputs for the operators of the head."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # T, H, V, dtype, quick; for a CPU
    (512, 64, 8192, torch.float32, True),
    (2048, 64, 32768, torch.float32, False),
    (2048, 128, 32768, torch.float32, False),
    (2048, 512, 32003, torch.float32, False),
    (2048, 896, 151936, torch.float32, False),
    (2048, 896, 151936, torch.bfloat16, False),
]


def drawn_head(
    t: int, h: int, v: int, dtype: torch.dtype, device: str = DEVICE
) -> tuple[torch.Generator, Tensor, Tensor, Tensor]:
    """Hidden states [T, H] and weight [V, H], which require gradients, targets [T], and the random generator."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(t, h, generator=g, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g, device=device) / h**0.5).to(dtype).requires_grad_()
    return g, hidden, weight, torch.randint(v, (t,), generator=g, device=device)
