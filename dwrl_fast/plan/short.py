"""The short form of a plan: one line about memory, for the dry run of a training."""

from typing import Literal

import torch

from dwrl_fast.compute import GIB, available
from dwrl_fast.config import TrainConfig
from dwrl_fast.plan.lengths import Lengths
from dwrl_fast.plan.memory import memory
from dwrl_fast.plan.profile import Profile
from dwrl_fast.plan.setup import planned
from dwrl_fast.plan.trace import trace

SMALL = 0.02  # kinds below this share of the sum are left out


def short(config: TrainConfig, lengths: Lengths, ranks: int) -> str:
    """The peak memory of each of `ranks`, and the memory of this machine's device. Raises UserError if the run cannot
    be planned.
    """
    profile = _here()
    setup = planned(config, lengths, profile)
    found = memory(setup, trace(setup, 1), ranks, config.token_budget)
    kinds = sorted(found.moments[found.fullest].items(), key=lambda kind: -kind[1])
    said = ", ".join(f"{kind} {size / GIB:.3g}" for kind, size in kinds if size > SMALL * found.peak)
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    there = profile.memory_gib if profile.device == "cuda" else profile.memory_gib / ranks
    fits = "" if found.peak / GIB < there else "; IT DOES NOT FIT: python -m dwrl_fast.plan says what to change"
    return f"{found.peak / GIB:.3g} GiB{each} at the peak, of {there:.3g} ({found.fullest}: {said}){fits}"


def _here() -> Profile:
    """A profile of this machine's memory; its rates are not used."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    size = available(torch.device(device))[1]
    return Profile("here", "this machine", device, size, {1: 1.0}, 1.0, 1.0, 1.0, 1.0)
