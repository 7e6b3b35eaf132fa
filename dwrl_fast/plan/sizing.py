"""For each number of GPUs: whether the run fits, its time and its cost; and possible changes if it does not fit."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from dwrl_fast.compute import GIB
from dwrl_fast.plan.memory import Memory, largest_budget, memory, parts
from dwrl_fast.plan.seconds import step
from dwrl_fast.plan.setup import Setup, planned
from dwrl_fast.plan.trace import Traced, trace

MOST = 1024  # the largest number of GPUs


class Sized(NamedTuple):
    """A run on `gpus`. budget: tokens of a micro-batch: the option's value or the largest that fits; 0 if none fits.
    largest: the largest budget that fits. memory: with `budget`, or with the option's value if none fits. seconds: of a
    step, by stage.
    """

    gpus: int
    budget: int
    largest: int
    memory: Memory
    seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether the run fits with the token budget of the options."""
        return self.budget > 0

    def hours(self, rows: int, batch: int) -> float:
        """The hours of an epoch of `rows` groups in rollout batches of `batch`."""
        return sum(self.seconds.values()) * rows / batch / 3600


def room(setup: Setup) -> float:
    """Bytes of a GPU that a run may use."""
    config: Any = setup.config
    return (setup.capacity - config.reserve_gib) * GIB


def sized(setup: Setup, traced: Traced, gpus: int) -> Sized:
    """The result for `gpus`."""
    wanted, largest = setup.config.token_budget, largest_budget(setup, traced, gpus, room(setup))
    fits = memory(setup, traced, gpus, wanted).peak <= room(setup)
    budget = wanted if fits else min(wanted, largest)
    taken = budget or wanted
    lying = parts(setup, gpus, max(taken, traced.small.tokens), traced.small.tokens)
    seconds = step(setup, traced, gpus, lying.parts, taken)
    return Sized(gpus, budget, largest, memory(setup, traced, gpus, taken), seconds)


def accepted(setup: Setup) -> list[int]:
    """The numbers of GPUs up to MOST that training accepts: powers of two, or with --hsdp of machines."""
    config: Any = setup.config
    unit = config.gpus_per_machine if config.hsdp else 1
    found = (unit * 2**power for power in range(MOST.bit_length()))
    return [gpus for gpus in found if gpus <= MOST and not config.refusal_on(gpus)]


def sizes(setup: Setup, traced: Traced) -> list[Sized]:
    """The results for all accepted numbers of GPUs."""
    return [sized(setup, traced, gpus) for gpus in accepted(setup)]


def changes(setup: Setup, traced: Traced, gpus: int) -> Iterator[str]:
    """Changes that could make the run fit, in words with figures. Each is computed like the run itself."""
    now, wanted = sized(setup, traced, gpus), setup.config.token_budget
    if now.largest:
        yield f"--token_budget {now.largest}: the largest that fits without other changes"
    for more in (size for size in accepted(setup) if size > gpus):
        peak = memory(setup, traced, more, wanted).peak
        if peak <= room(setup):
            yield f"{more} GPUs: {peak / GIB:.1f} GiB on each"
            break
    yield from (_told(setup, values, traced, gpus) for values in _as_traced(setup, gpus))
    less: dict[str, Any] = {"gradient_checkpointing": True}
    for values in (less, less | {"use_peft": True}):
        if any(getattr(setup.config, name) != value for name, value in values.items()):
            yield _told(setup, values, None, gpus)


def _as_traced(setup: Setup, gpus: int) -> Iterator[dict[str, Any]]:
    """Changes of options that do not affect passes with gradients."""
    config = setup.config
    if setup.writes and config.generation_cache_gib > 1:
        yield {"generation_cache_gib": 1.0}
    if config.use_peft and gpus == 1 and not config.load_in_4bit:
        yield {"load_in_4bit": True}
    cuda = setup.profile.device == "cuda"
    if gpus > 1 and cuda and not config.cpu_offload and not config.use_liger_kernel:
        yield {"cpu_offload": True}
    if setup.writes and gpus > 1:
        yield {"use_vllm": True, "vllm_mode": "server"}


def _told(setup: Setup, values: dict[str, Any], traced: Traced | None, gpus: int) -> str:
    """The result of the run with changed options, in words; traced again if the activations change."""
    other = planned(dataclasses.replace(setup.config, **values), setup.lengths, setup.profile)
    found = sized(other, traced or traced_on(other, gpus), gpus)
    words = " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in values.items())
    if not found.largest:
        return f"{words}: {found.memory.peak / GIB:.1f} GiB, still too much"
    fewer = "" if found.budget == setup.config.token_budget else f" --token_budget {found.budget}"
    return f"{words}{fewer}: {found.memory.peak / GIB:.1f} GiB"


def _beside(setup: Setup) -> int | None:
    """The ranks per machine if each machine holds a whole model (--hsdp); otherwise None."""
    config: Any = setup.config
    return config.gpus_per_machine if config.hsdp else None


def traced_on(setup: Setup, gpus: int) -> Traced:
    """The trace of the run on `gpus` GPUs."""
    return trace(setup, gpus, _beside(setup))
