"""Device profiles: published peak rates with the share that a run is assumed to reach, or rates that `doctor --profile`
measured on a machine.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from dwrl_fast.errors import ConfigError
from dwrl_fast.files import bounded_text, bounded_yaml

PUBLISHED = Path(__file__).with_name("profiles.yaml")
RATES = ("memory_gib", "attention", "memory", "link", "network")
SHARES = ("products", "attention", "memory", "link", "network", "sampling")


@dataclass(frozen=True, slots=True)
class Profile:
    """A device and its links. All rates are per second.

    source: the origin of the figures, in words. products: FLOPs of matrix products by their smallest dimension; one
    entry if the size does not matter. attention: FLOPs of attention, forward and backward. memory: bytes read or
    written. link, network: bytes that one device sends (and receives at the same time) within its machine and to other
    machines. operator: seconds of overhead per operator. overlaps: whether collectives run in parallel with
    computation. shares: the reached share of each rate; `sampling`: of all rates while thoughts are sampled.
    """

    name: str
    source: str
    device: Literal["cuda", "cpu"]
    memory_gib: float
    products: dict[int, float]
    attention: float
    memory: float
    link: float
    network: float
    operator: float = 0.0
    overlaps: bool = True
    shares: dict[str, float] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """The reached share of a published rate; 1 for a measured rate."""
        return self.shares.get(name, 1.0)

    def product_rate(self, smallest: int) -> float:
        """FLOPs per second of a product with this smallest dimension; interpolated between the given ones in
        logarithms.
        """
        sizes = sorted(self.products)
        rates = [self.products[size] for size in sizes]
        return float(np.interp(np.log(max(1, smallest)), np.log(sizes), rates)) * self.share("products")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of --dtype auto on such a device."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def to_yaml(self) -> str:
        """The profile as YAML, which `load_profile` reads."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def published() -> dict[str, dict[str, Any]]:
    """The profiles of profiles.yaml by name."""
    found: dict[str, dict[str, Any]] = bounded_yaml(bounded_text(PUBLISHED), PUBLISHED.name)
    return found


def load_profile(name: str) -> Profile:
    """A published profile by its name, or a file of `doctor --profile`. Raises ConfigError if there is neither, or if
    the file is not a profile.
    """
    known = published()
    if name in known:
        return _profile(name, known[name] | {"name": name})
    try:
        values = bounded_yaml(bounded_text(name), name)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--profile {name}: it is neither one of {', '.join(known)} nor a profile file ({error}). `python -m "
            "dwrl_fast.doctor --profile FILE` measures this machine and writes such a file"
        ) from None
    return _profile(name, values)


def _profile(name: str, values: Any) -> Profile:
    try:
        made = Profile(**values)
        strange = set(made.shares) - set(SHARES)
        if strange:
            raise ValueError(f"unknown shares: {', '.join(sorted(strange))}")
        # YAML reads 330e12, which has no point and no sign, as a string.
        floats: dict[str, Any] = {rate: float(getattr(made, rate)) for rate in (*RATES, "operator")}
        made = replace(
            made,
            products={int(size): float(rate) for size, rate in made.products.items()},
            shares={share: float(value) for share, value in made.shares.items()},
            **floats,
        )
        rates = [*made.products.values(), *made.shares.values(), *(getattr(made, rate) for rate in RATES)]
        known = bool(made.products) and made.device in ("cuda", "cpu")
        if not (known and all(0 < rate < math.inf for rate in rates) and 0 <= made.operator < math.inf):
            raise ValueError("the device is cuda or cpu, rates and memory are above 0, and operator is not negative")
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{name} is not a device profile: {error}. dwrl_fast/plan/profiles.yaml shows the form"
        ) from None
    return made
