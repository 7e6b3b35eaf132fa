"""The form of file names in options: a single file, or parts of a mixture, each with a weight and an aspect."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any, ClassVar

from dwrl_fast.errors import ConfigError

SUFFIXES = re.compile(r"(\.(jsonl?|ndjson|csv|tsv|parquet|gz|bz2|zst))+$")


@dataclass(frozen=True, slots=True)
class Part:
    """One file or data set. weight: its share of a mixture; None outside a mixture. aspect: the aspect of rows without
    an aspect column; None: the aspect of the run.
    """

    metavar: ClassVar[str] = "FILE"

    dataset_name: str
    weight: float | None = None
    aspect: str | None = None

    def __str__(self) -> str:
        """As the command line has it."""
        aspect = "" if self.aspect is None else f":{self.aspect}"
        weight = "" if self.weight is None else repr(self.weight)
        return f"{self.dataset_name}:{weight}{aspect}" if weight or aspect else self.dataset_name

    @classmethod
    def parse(cls, value: Any) -> "Part":
        """From FILE, FILE:WEIGHT, FILE:WEIGHT:ASPECT or FILE::ASPECT, or a mapping with the fields as keys. The file
        name itself may contain colons, like names of the hub; a weight is recognised as a number. Raises ValueError.
        """
        if isinstance(value, Part):
            return value
        if isinstance(value, Mapping):
            return cls(**_checked(value))
        if not isinstance(value, str) or not value:
            raise ValueError(
                "expected FILE, FILE:WEIGHT or FILE:WEIGHT:ASPECT, or a mapping with dataset_name, weight and aspect"
            )
        name, weight, aspect = _split(value)
        return cls(**_checked({"dataset_name": name, "weight": weight, "aspect": aspect}))


def _split(text: str) -> tuple[str, float | None, str | None]:
    words = text.split(":")
    last, before = _number(words[-1]), _number(words[-2]) if len(words) > 2 else None
    if last is not None and before is not None:
        raise ValueError(
            f"{words[-2]} and {words[-1]} could each be the weight; write it in a YAML file (--config), as "
            "{dataset_name: FILE, weight: 1, aspect: TEXT}"
        )
    if len(words) > 2 and (before is not None or not words[-2]):
        return ":".join(words[:-2]), before, words[-1] or None
    if len(words) > 1 and last is not None:
        return ":".join(words[:-1]), last, None
    return text, None, None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(Part)]
    unknown = [str(key) for key in given if key not in names]
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}; the keys are {', '.join(names)}")
    name, weight, aspect = (given.get(key) for key in names)
    if not isinstance(name, str) or not name:
        raise ValueError("dataset_name is missing: the file, folder or hub name")
    if aspect is not None and (not isinstance(aspect, str) or not aspect):
        raise ValueError(f"aspect = {aspect!r}: expected text, in quotes if YAML would read it as another type")
    if weight is not None:
        weight = _number(weight) or weight if isinstance(weight, str) else weight  # YAML 1.1 reads 5e-1 as text
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"weight = {weight!r}: expected a number")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight = {weight:g}: must be a number > 0; leave out a file that is not to be used")
        weight = float(weight)
    return {"dataset_name": name, "weight": weight, "aspect": aspect}


def check_mixture(parts: Sequence[Part]) -> None:
    """Raises ConfigError if `parts` are not a valid mixture."""
    if len(parts) == 1:
        raise ConfigError(
            f"dataset_mixture names only {parts[0].dataset_name}: a mixture has at least two. For one file give "
            "--dataset_name (and --aspect)."
        )
    for part in parts:
        if part.weight is None:
            raise ConfigError(
                f"dataset_mixture: {part.dataset_name} has no weight. Write FILE:WEIGHT or FILE:WEIGHT:ASPECT, as in "
                "--dataset_mixture a.jsonl:0.7 b.jsonl:0.3; weights need not sum to 1."
            )
    _check_distinct("dataset_mixture", parts)


def check_evaluated(option: str, parts: Sequence[Part]) -> None:
    """Raises ConfigError if `parts` cannot be used for evaluation."""
    for part in parts:
        if part.weight is not None:
            raise ConfigError(
                f"{option}: {part.dataset_name} has a weight ({part.weight:g}), but evaluation reads every row: leave "
                "the weight out (with an aspect: FILE::ASPECT)."
            )
    _check_distinct(option, parts)


def _check_distinct(option: str, parts: Sequence[Part]) -> None:
    """Raises ConfigError if a file is named twice, because its rows could not be distinguished."""
    names = [str(PurePath(part.dataset_name)) for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{option} names {twice} twice: name it once, with the sum of the weights if it has any.")


def short_names(names: Sequence[str]) -> dict[str, str]:
    """A distinct short name for each of `names`: the file name without suffix, with as many parent folders as needed to
    distinguish them.
    """
    paths = {name: PurePath(SUFFIXES.sub("", name) or name).parts for name in names}
    found = dict(zip(names, names, strict=True))
    for count in range(max((1, *map(len, paths.values()))), 0, -1):  # the shortest unique ending is kept
        times = Counter(parts[-count:] for parts in paths.values())
        found |= {name: str(PurePath(*parts[-count:])) for name, parts in paths.items() if times[parts[-count:]] == 1}
    return found
