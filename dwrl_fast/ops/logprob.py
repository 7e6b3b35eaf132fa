from torch import Tensor

from dwrl_fast import reference


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    return reference.linear_logprob(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, return_entropy=return_entropy
    )


def yes_no_logprob(
    hidden: Tensor,
    weight: Tensor,
    yes_id: int,
    no_id: int,
    *,
    normalization: str = "vocab",
    bias: Tensor | None = None,
    softcap: float | None = None,
    return_mass: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    return reference.yes_no_logprob(
        hidden, weight, yes_id, no_id, normalization=normalization, bias=bias, softcap=softcap, return_mass=return_mass
    )
