"""The reference pages of the commands: every option as a table row, from the classes that the commands parse."""

import re
from collections.abc import Iterator

from dwrl_fast.compare import CompareConfig
from dwrl_fast.config import EvaluateConfig, TrainConfig
from dwrl_fast.data.__main__ import DataConfig
from dwrl_fast.dialog.__main__ import ShowConfig
from dwrl_fast.doctor import DoctorConfig
from dwrl_fast.options import Described, Options, described
from dwrl_fast.plan import PlanConfig

DOCUMENT = re.compile(r"docs/\w+\.md")
COMMANDS: dict[str, type[Options]] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "data": DataConfig,
    "dialog": ShowConfig,
    "doctor": DoctorConfig,
    "plan": PlanConfig,
}


def command_pages() -> dict[str, str]:
    """The Markdown of each command's page, by its path in the site."""
    return {f"reference/{name}.md": command_page(name) for name in COMMANDS}


def command_page(name: str) -> str:
    """The page of one command: its summary, its examples, and a table for each group of its options.

    Options that a command inherits from `train` stand on the page of `train` alone.
    """
    cls = COMMANDS[name]
    inherits = name != "train" and issubclass(cls, TrainConfig)
    known = set(_rows(TrainConfig)) if inherits else set()
    lines = [f"# `{cls.command}`", "", cls.summary, "", "```sh", cls.examples.strip(), "```", ""]
    if inherits:
        lines += ["The options of [`dwrl_fast.train`](train.md) are accepted too; they are described there.", ""]
    for group, options in described(cls).items():
        own = [option for option in options if option not in known]
        if own:
            lines += [f"## {group}", "", "| option | values | default | |", "|---|---|---|---|", *map(_row, own), ""]
    return "\n".join(lines)


def _rows(cls: type[Options]) -> Iterator[Described]:
    for options in described(cls).values():
        yield from options


def _row(option: Described) -> str:
    """One table row. The option's name is an anchor, so that it can be linked to."""
    values = " ".join([*(f"`{value}`" for value in option.accepts.split("|")), option.bound])
    meaning = DOCUMENT.sub(r"[\g<0>](../\g<0>)", option.help)
    meaning += f" *Only {option.needs}.*" if option.needs else ""
    name = f"`{option.name}`{{ #{option.name.removeprefix('--')} }}"
    return "| {} | {} | `{}` | {} |".format(name, *(_cell(text) for text in (values, option.default, meaning)))


def _cell(text: str) -> str:
    """Text as it can stand in a cell: a bar would end it."""
    return text.replace("|", "\\|")
