"""Options from a dataclass: command line, YAML files and help page are all derived from its fields.

A command's options are the fields of a frozen dataclass derived from `Options`, each made by `option(...)`. The type
says what is accepted (`int`, `float`, `bool`, `str`, `Literal[...]`, `X | None`, `dict[str, str]`, `tuple[X, ...]`, or
a dataclass with a `parse` that raises ValueError and a `metavar`), and the metadata say what the option means.
"""

import dataclasses
import difflib
import math
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import ConfigError
from .files import bounded_text, bounded_yaml
from .log import warn_once

COMMAND_LINE = "the command line"
Configuration = TypeVar("Configuration", bound="Options")
BOOLEANS = {"true": True, "on": True, "false": False, "off": False}


@dataclass(frozen=True)
class Bound:
    """A condition on a number, as text for the help page and as a predicate."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Bound("> 0", lambda v: v > 0)
OPEN_FRACTION = Bound("in (0, 1)", lambda v: 0 < v < 1)
FRACTION = Bound("in [0, 1]", lambda v: 0 <= v <= 1)


def at_least(low: float) -> Bound:
    """The condition that a number is at least `low`."""
    return Bound(f">= {low}", lambda v: v >= low)


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    group: str,
    bound: Bound | None = None,
    refused: Mapping[str, str] | None = None,
    needs: tuple[str, str | bool | tuple[str, ...]] | None = None,
) -> Any:
    """A field that is an option.

    `refused` maps values that people may try, but that are not supported, to the reason. `needs=("method", "dwrl")`:
    the option has an effect only if the other option has that value, or one of several values. An option without a
    default must be given.
    """
    metadata = {"group": group, "help": help, "bound": bound, "refused": refused or {}, "needs": needs}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base class of a command's options. The constructor raises ConfigError for an invalid combination."""

    command: ClassVar[str]
    summary: ClassVar[str]
    groups: ClassVar[tuple[str, ...]]
    examples: ClassVar[str]

    explicit: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """The options that the user set, in YAML or on the command line."""

    def __post_init__(self) -> None:
        _check_bounds(type(self), {f.name: getattr(self, f.name) for f in option_fields(type(self))})
        self.validate()

    def validate(self) -> None:
        """Raise ConfigError if options contradict each other."""

    def check_new_files(self, *names: str) -> None:
        """Raise ConfigError where a file that one of these options names exists already, or its folder does not."""
        for name in names:
            path = getattr(self, name)
            if path is not None and Path(path).exists():
                raise ConfigError(f"{name} = {path} exists already: name another, or remove it")
            if path is not None and not Path(path).parent.is_dir():
                raise ConfigError(f"{name} = {path}: its folder does not exist; make it first")

    def changed(self, name: str) -> bool:
        """Whether the user set the option to a value other than the default (a saved configuration sets every
        option).
        """
        default = next(f.default for f in dataclasses.fields(self) if f.name == name)
        return name in self.explicit and getattr(self, name) != default

    @classmethod
    def needs(cls, f: dataclasses.Field) -> tuple[str, str | bool | tuple[str, ...]] | None:
        """The other option, and the value or values that it must have for this option to have an effect; None if there
        is none.
        """
        found: tuple[str, str | bool | tuple[str, ...]] | None = f.metadata["needs"]
        return found

    def without_effect(self) -> dict[str, str]:
        """The options that the user changed but that have no effect, each with the value that it needs
        (`method=dwrl`).
        """
        unmet = {}
        for f in option_fields(type(self)):
            if (need := self.needs(f)) is not None and self.changed(f.name):
                other, value = need
                if getattr(self, other, value) not in (value if isinstance(value, tuple) else (value,)):
                    unmet[f.name] = f"{other}={_said(value)}"
        return unmet

    def say_without_effect(self) -> None:
        """Log a warning for each option of `without_effect`."""
        for name, need in self.without_effect().items():
            warn_once(f"{name} has no effect here: it applies only with {need}.")

    def to_dict(self) -> dict[str, Any]:
        """Every option by name, with values that YAML can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in option_fields(type(self))}

    def to_arguments(self, also: Collection[str] = (), shown: Callable[[Any], Any] | None = None) -> list[str]:
        """The command line that gives this configuration: the options that are not their defaults, and those `also`
        named. shown: changes each value.
        """
        found: list[str] = []
        for f in option_fields(type(self)):
            value = getattr(self, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if value == default and f.name not in also:
                continue
            value = value if shown is None else shown(value)
            if isinstance(value, dict):
                found += [word for item in value.items() for word in (f"--{f.name}", "=".join(item))]
            elif isinstance(value, tuple) and value:
                found += [f"--{f.name}", *map(str, value)]
            else:
                text = _said(value or None if isinstance(value, tuple) else value)
                found += [f"--{f.name}={text}"] if text.startswith("--") else [f"--{f.name}", text]
        return found

    def to_yaml(self) -> str:
        """Every option, grouped. Read with `--config`, the text gives an equal configuration."""
        parts = []
        for group, fields in grouped(type(self)).items():
            values = {f.name: _plain(getattr(self, f.name)) for f in fields}
            parts.append(f"# {group}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        return "\n".join(parts)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml` to a file."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


def _check_bounds(cls: type[Options], values: Mapping[str, Any], where: str = "") -> None:
    for f in option_fields(cls):
        value, bound = values.get(f.name), f.metadata["bound"]
        if bound is not None and value is not None and not bound.holds(value):
            place = f" (in {where})" if where else ""
            raise ConfigError(f"{f.name} = {value!r}{place}: must be {bound.words}.")


def _plain(value: Any) -> Any:
    """The value in a form that YAML can hold."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return " or ".join(map(_said, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def option_fields(cls: type[Options]) -> list[dataclasses.Field]:
    """The fields that are options."""
    return [f for f in dataclasses.fields(cls) if "help" in f.metadata]


def grouped(cls: type[Options]) -> dict[str, list[dataclasses.Field]]:
    """The options by group. In each group, the command's own options come before those shared with other commands."""
    groups: dict[str, list[dataclasses.Field]] = {group: [] for group in cls.groups}
    for f in sorted(option_fields(cls), key=lambda f: f.name not in cls.__annotations__):
        groups[f.metadata["group"]].append(f)
    return {group: fields for group, fields in groups.items() if fields}


# Values


def _convert(hint: Any, value: Any) -> Any:
    """Convert `value`, from YAML or from the command line, to the type `hint`. The ValueError says what was
    expected.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        return None if value is None or value == "none" else _convert(inner, value)
    if origin is Literal:
        if value in args:
            return value
        raise ValueError("expected " + (f"one of {', '.join(args)}" if len(args) > 1 else args[0]))
    if origin is dict:
        if isinstance(value, Mapping) and all(isinstance(part, str) for item in value.items() for part in item):
            return dict(value)
        raise ValueError("expected new=old, as in --columns prompt=question (in YAML a mapping, new: old)")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        items = [] if list(items) in ([None], ["none"]) else items
        return tuple(_convert(args[0], item) for item in items)
    if hasattr(hint, "parse"):
        return hint.parse(value)
    if hint is bool:
        value = BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value
        if isinstance(value, bool):
            return value
        raise ValueError("expected true or false (or on, off)")
    if hint is str:
        if isinstance(value, str) and value:
            return value
        raise ValueError(
            "expected text" + ("" if isinstance(value, str) else ", in quotes if YAML would read it as another type")
        )
    return _number(hint, value)


def _number(kind: type, value: Any) -> int | float:
    expected = "expected a whole number" if kind is int else "expected a finite number"
    # YAML 1.1 reads 5e-7 as text, so text is converted for both sources.
    if isinstance(value, bool) or not isinstance(value, (str, int, float if kind is float else int)):
        raise ValueError(expected)
    try:
        number: int | float = kind(value)
    except ValueError:
        raise ValueError(expected) from None
    if not math.isfinite(number):
        raise ValueError(expected)
    return number


def _unknown(name: str, names: Sequence[str], where: str) -> ConfigError:
    wanted = name.lower().replace("-", "_")
    abbreviated = [n for n in names if "".join(word[0] for word in n.split("_")) == wanted]
    # The longest, so that lr suggests learning_rate and not lora_r.
    nearest = max(abbreviated or difflib.get_close_matches(wanted, names, n=1, cutoff=0.0), key=len)
    dashes = "--" if where == COMMAND_LINE else ""
    return ConfigError(
        f"Unknown option {dashes}{name} in {where}. The nearest is {dashes}{nearest}; --help lists them all."
    )


def checked(cls: type[Options], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of `cls` that were read from `where`, with every value converted. Raises ConfigError if one is unknown or
    has a wrong type or range; the error names the key, the value, what was expected, and `where`.
    """
    fields, hints = {f.name: f for f in option_fields(cls)}, get_type_hints(cls)
    values = {}
    for name, value in given.items():
        if name not in fields:
            raise _unknown(str(name), list(fields), where)
        if isinstance(value, str) and value in fields[name].metadata["refused"]:
            raise ConfigError(
                f"{name} = {value} (in {where}) is not offered: {fields[name].metadata['refused'][value]}"
            )
        try:
            values[name] = _convert(hints[name], value)
        except ValueError as error:
            raise ConfigError(f"{name} = {value!r} (in {where}): {error}.") from None
    _check_bounds(cls, values, where)
    return values


# Sources


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = bounded_yaml(bounded_text(path), path)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--config {path}: not valid YAML. {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected lines of `option: value`, found a {type(values).__name__}.")
    return values


def _read_command_line(cls: type[Options], argv: Sequence[str]) -> dict[str, Any]:
    """The option names with their texts. A bool without a value is true. Dict and tuple options accumulate; for all
    others the last value counts.
    """
    kinds = get_type_hints(cls)
    hints = {f.name: kinds[f.name] for f in option_fields(cls)} | {"config": tuple[str, ...]}
    given: dict[str, Any] = {}
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(f"Unexpected argument {argument!r}: options are written --name value or --name=value.")
        name, equals, value = argument[2:].partition("=")
        if name not in hints:
            raise _unknown(name, list(hints), COMMAND_LINE)
        if not equals:
            if arguments and not arguments[0].startswith("--"):
                value = arguments.pop(0)
            elif hints[name] is bool:
                value = "true"
            else:
                raise ConfigError(f"--{name} has no value. One that starts with dashes is written --{name}=value.")
        if get_origin(hints[name]) is dict:
            new, equals, old = value.partition("=")
            if not (new and old):
                raise ConfigError(f"--{name} {value}: expected new=old, once for each column.")
            given.setdefault(name, {})[new] = old
        elif get_origin(hints[name]) is tuple:
            given.setdefault(name, []).append(value)
            while not equals and arguments and not arguments[0].startswith("--"):
                given[name].append(arguments.pop(0))
        else:
            given[name] = value
    return given


Base = Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]


def parse(cls: type[Configuration], argv: Sequence[str], base: Base | None = None) -> Configuration:
    """The configuration from the defaults, `base`, the YAML files of --config and the command line. Later sources
    override earlier ones.

    Each file is checked separately, so that an error names the wrong file.

    base: the values of a recipe, or a function that computes them from what the user gave (so that a recipe need not
    apply). -h and --help print the help page and raise SystemExit(0). All errors are ConfigErrors.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(help_page(cls))
        raise SystemExit(0)
    line = _read_command_line(cls, argv)
    given: dict[str, Any] = {}
    for path in line.pop("config", ()):
        given |= checked(cls, _read_yaml(path), path)
    given |= checked(cls, line, COMMAND_LINE)
    recipe = base(given) if callable(base) else base or {}
    values = checked(cls, recipe, "the recipe") | given
    for f in option_fields(cls):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values:
            raise ConfigError(f"--{f.name} is missing: {f.metadata['help']}")
    return cls(**values, explicit=frozenset(given))


def given_by(cls: type[Configuration], caller: str, **values: Any) -> Configuration:
    """The configuration of a caller in Python, checked like that of a command. ConfigErrors name `caller`."""
    return cls(**checked(cls, values, caller), explicit=frozenset(values))


# Help


def _accepts(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if get_origin(hint) is dict:
        return "NEW=OLD"
    if get_origin(hint) is tuple:
        return f"{_accepts(get_args(hint)[0])} ..."
    if hasattr(hint, "metavar"):
        return hint.metavar
    if get_origin(hint) in (Union, types.UnionType):
        return _accepts(next(a for a in get_args(hint) if a is not type(None)))
    return "true|false" if hint is bool else {int: "N", float: "X", str: "TEXT"}[hint]


def _default(f: dataclasses.Field) -> str:
    if f.default_factory is not dataclasses.MISSING:
        return "none"
    if f.default is dataclasses.MISSING:
        return "must be given"
    return "none" if f.default == () else _said(f.default)


class Described(NamedTuple):
    """An option in words: its name with dashes, what it accepts, its range, its default, what it needs, its help. Range
    and need are empty where there is none.
    """

    name: str
    accepts: str
    bound: str
    default: str
    needs: str
    help: str


def described(cls: type[Options]) -> dict[str, list[Described]]:
    """The options by group, as the help page and the documentation show them."""
    hints = get_type_hints(cls)

    def one(f: dataclasses.Field) -> Described:
        bound, need = f.metadata["bound"], cls.needs(f)
        needs = "" if need is None or need[0] not in hints else "with {} {}".format(*map(_said, need))
        words = "" if bound is None else bound.words
        return Described(f"--{f.name}", _accepts(hints[f.name]), words, _default(f), needs, f.metadata["help"])

    return {group: [one(f) for f in fields] for group, fields in grouped(cls).items()}


def help_page(cls: type[Options], width: int | None = None) -> str:
    """The text of --help, wrapped to `width` columns (by default the terminal's, at most 110)."""
    width = width or min(shutil.get_terminal_size().columns, 110)
    lines = [f"Usage: {cls.command} [--config FILE ...] [--option value] ...", ""]
    lines += [*textwrap.wrap(cls.summary, width), ""]
    order = (
        "Values come from the defaults [in brackets], then the files of --config, then the command line. Files are "
        "merged from left to right: the later value of an option applies, also if it is a list or a mapping. A second "
        "--config adds its files to those of the first."
    )
    lines += textwrap.wrap(order, width)
    for group, options in described(cls).items():
        lines += ["", group]
        for each in options:
            needs = each.needs and f"({each.needs})"
            head = " ".join(filter(None, (each.name, each.accepts, each.bound, f"[{each.default}]", needs)))
            lines += textwrap.wrap(head, width, initial_indent=" " * 2, subsequent_indent=" " * 6)
            lines += textwrap.wrap(each.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, "", "Examples", textwrap.indent(cls.examples.strip(), "  "), ""])
