"""Templates of judging turns: the kinds, their schema, and how contents are filled in.

A template is a YAML file. In its texts, a word in braces is a placeholder and is replaced once: braces in a response
are not replaced.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import yaml

from dwrl_fast.errors import TemplateError
from dwrl_fast.files import bounded_text, bounded_yaml

PLACE = re.compile(r"\{([a-z_]+)\}")
DEFAULT = "dialog"


@dataclass(frozen=True, slots=True)
class Kind:
    """The texts of a kind with the placeholders that each must contain, whether it has labels, and what its answer must
    contain.
    """

    texts: Mapping[str, tuple[str, ...]]
    labels: bool
    answer: tuple[str, ...] = ()


_COMPARISON = ("prompt", "response_a", "response_b")
KINDS = {
    "dialog": Kind({"evaluate": (), "rate": ()}, labels=True),
    "pairwise": Kind(
        {"evaluate": _COMPARISON}, labels=False, answer=("<answer>[[A]]</answer>", "<answer>[[B]]</answer>")
    ),
    "pointwise": Kind({"evaluate": ("prompt", "response")}, labels=False, answer=("<s>", "</s>")),
    "direct": Kind({"evaluate": _COMPARISON}, labels=True),
    "rationalizer": Kind(
        {"evaluate": (*_COMPARISON, "verdict")}, labels=False, answer=("<answer>[[{verdict}]]</answer>",)
    ),
}


@dataclass(frozen=True)
class Template:
    """The turns that make a model judge.

    kind: one of KINDS. `evaluate` asks for the thought (kind direct: for the label), `rate` for the label after a
    thought (kind dialog). labels: the two labels that are scored, the better one first (dialog), or in the order of the
    responses (direct). The other kinds are answered in text.
    """

    evaluate: str
    rate: str = ""
    labels: tuple[str, str] | None = ("Yes", "No")
    kind: str = DEFAULT

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `read_template` reads."""
        values = asdict(self) | {"labels": list(self.labels or ())}
        kind = KINDS[self.kind]
        return {key: values[key] for key in ("kind", *kind.texts, *["labels"] * kind.labels)}


def template_names() -> tuple[str, ...]:
    """The names of the packaged templates."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml")))


def load_template(name_or_file: str = DEFAULT) -> Template:
    """A packaged template by its name, or a YAML file. Raises TemplateError, which names file, key and remedy."""
    if name_or_file in template_names():
        text = (_folder() / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = bounded_text(name_or_file)
        except (OSError, ValueError) as error:
            near = difflib.get_close_matches(name_or_file, template_names(), n=1)
            raise TemplateError(
                f"--template {name_or_file}: neither a file that can be read ({error}) nor one of "
                f"{', '.join(template_names())}" + (f"; did you mean {near[0]}?" if near else "")
            ) from None
    try:
        values = bounded_yaml(text, name_or_file)
    except yaml.YAMLError as error:
        raise TemplateError(f"template {name_or_file}: not valid YAML. {error}") from None
    template = read_template(values, name_or_file)
    _check_asks(template, name_or_file)
    return template


def read_template(values: Any, where: str) -> Template:
    """The template in a mapping, checked against its kind. where: its name in TemplateErrors."""
    if not isinstance(values, dict):
        raise TemplateError(f"template {where}: expected lines of `key: value`, found a {type(values).__name__}")
    name = values.get("kind", DEFAULT)
    if not isinstance(name, str) or name not in KINDS:
        near = difflib.get_close_matches(str(name), KINDS, n=1, cutoff=0.0)[0]
        raise _error(where, "kind", f"{name!r} is not one of {', '.join(KINDS)}; the nearest is {near}")
    kind = KINDS[name]
    keys = ["kind", *kind.texts, *["labels"] * kind.labels]
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
            raise _error(
                where, key, f"unknown in a template of kind {name}, which has {', '.join(keys)}; the nearest is {near}"
            )
    for key in keys[1:]:
        if key not in values:
            raise _error(where, key, f"missing; a template of kind {name} has {', '.join(keys)}")
    texts = {key: _text(values[key], key, shown, where) for key, shown in kind.texts.items()}
    labels = _labels(values["labels"], where) if kind.labels else None
    return Template(**texts, labels=labels, kind=name)


def fill(text: str, contents: Mapping[str, str]) -> tuple[str, dict[str, slice]]:
    """`text` with all placeholders filled in one pass, and the span of the last occurrence of each content, in
    characters.
    """
    parts: list[str] = []
    places: dict[str, slice] = {}
    end = length = 0
    for match in PLACE.finditer(text):
        content = contents[match[1]]
        before = text[end : match.start()]
        start = length + len(before)
        end, length = match.end(), start + len(content)
        parts += [before, content]
        places[match[1]] = slice(start, length)
    return "".join([*parts, text[end:]]), places


def _folder() -> Any:
    return resources.files(__package__)


def _error(where: str, key: Any, what: str) -> TemplateError:
    return TemplateError(f"template {where}, key {key!r}: {what}")


def _text(value: Any, key: str, shown: tuple[str, ...], where: str) -> str:
    """Check that a text contains each of `shown` once. Strips white space at its ends, because chat templates treat it
    differently.
    """
    if not isinstance(value, str) or not value.strip():
        raise _error(where, key, f"expected a text, found {value!r}; quote what YAML reads otherwise")
    used, allowed = PLACE.findall(value), ("aspect", *shown)
    for name in used:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)[0]
            raise _error(where, key, f"{{{name}}} is not a known placeholder; the nearest is {{{near}}}")
    for name in shown:
        if name not in used:
            raise _error(where, key, f"{{{name}}} is missing, so the model would not see it; write it where it belongs")
        if used.count(name) > 1 and name != "verdict":
            raise _error(where, key, f"{{{name}}} occurs {used.count(name)} times; leave one")
    order = [name for name in used if name in ("prompt", "response_a", "response_b")]
    if order != sorted(order):
        raise _error(
            where, key, f"the contents are in the order {', '.join(order)}; put them in {', '.join(sorted(order))}"
        )
    return value.strip()


def _labels(value: Any, where: str) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str) and v for v in value):
        raise _error(where, "labels", f'expected two texts, as in ["Yes", "No"] with the quotes, found {value!r}')
    if value[0] == value[1]:
        raise _error(where, "labels", f"both are {value[0]!r}; give two that differ")
    return value[0], value[1]


def _check_asks(template: Template, where: str) -> None:
    """Check that a file asks about the aspect and for an answer that can be parsed. Templates made by a program are not
    checked.
    """
    if "{aspect}" not in template.evaluate:
        raise _error(
            where, "evaluate", "{aspect} is missing, so --aspect would change nothing; write it where it belongs"
        )
    for answer in KINDS[template.kind].answer:
        if answer not in template.evaluate:
            raise _error(where, "evaluate", f"it does not ask for {answer}, so no verdict could be read; say so in it")
