"""The packaged templates, and the errors for invalid template files."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dwrl_fast.dialog import read_choice, read_score
from dwrl_fast.errors import TemplateError
from dwrl_fast.templates import KINDS, Template, fill, load_template, read_template, template_names

DIALOG = {"kind": "dialog", "evaluate": "Judge its {aspect}.", "rate": "Good?", "labels": ["Yes", "No"]}
ASKS = "Its {aspect}: {prompt} {response_a} {response_b}"
PAIRWISE = {"kind": "pairwise", "evaluate": ASKS + " <answer>[[A]]</answer> or <answer>[[B]]</answer>?"}
DIRECT = {"kind": "direct", "evaluate": ASKS, "labels": ["A", "B"]}
POINTWISE = {"kind": "pointwise", "evaluate": "Its {aspect}: {prompt} {response}, as in <s>N</s>"}


def write(folder: Path, values: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_one_of_each_kind_comes_with_the_package() -> None:
    assert set(template_names()) == {*KINDS, "brief"}
    for name in template_names():
        template = load_template(name)
        assert template.kind == ("dialog" if name == "brief" else name) and "{aspect}" in template.evaluate
        assert read_template(template.to_dict(), "") == template
    assert load_template() == load_template("dialog")
    assert load_template("dialog").labels == ("Yes", "No") and load_template("direct").labels == ("A", "B")


@pytest.mark.parametrize("values", [DIALOG, PAIRWISE, DIRECT, POINTWISE])
def test_a_file(values: dict, tmp_path: Path) -> None:
    template = load_template(write(tmp_path, values))
    assert template.to_dict() == values


def test_a_dialog_may_leave_out_its_kind(tmp_path: Path) -> None:
    assert load_template(write(tmp_path, {k: v for k, v in DIALOG.items() if k != "kind"})).kind == "dialog"


def without(values: dict, key: str) -> dict:
    return {k: v for k, v in values.items() if k != key}


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        (DIALOG | {"evalute": "?"}, "evalute", "has kind, evaluate, rate, labels; the nearest is evaluate"),
        (without(DIALOG, "rate"), "rate", "missing; a template of kind dialog has"),
        (without(DIALOG, "labels"), "labels", "missing"),
        (PAIRWISE | {"labels": ["A", "B"]}, "labels", "unknown in a template of kind pairwise"),
        (DIALOG | {"kind": "pairwice"}, "kind", "'pairwice' is not one of dialog, .*; the nearest is pairwise"),
        (DIALOG | {"kind": ["dialog"]}, "kind", "is not one of"),
        (DIALOG | {"labels": ["Yes"]}, "labels", "expected two texts"),
        (DIALOG | {"labels": [True, False]}, "labels", r'as in \["Yes", "No"\] with the quotes'),
        (DIALOG | {"labels": ["Yes", "Yes"]}, "labels", "both are 'Yes'"),
        (DIALOG | {"evaluate": "Judge it."}, "evaluate", r"\{aspect\} is missing"),
        (
            DIALOG | {"evaluate": "Judge its {aspects}."},
            "evaluate",
            r"\{aspects\} is not a known placeholder; the nearest is \{aspect\}",
        ),
        (DIALOG | {"evaluate": "Its {aspect}: {response}"}, "evaluate", r"\{response\} is not a known placeholder"),
        (DIALOG | {"rate": " "}, "rate", "expected a text"),
        (DIALOG | {"rate": 3}, "rate", "expected a text, found 3"),
        (DIRECT | {"evaluate": "{aspect} {prompt} {response_b}"}, "evaluate", r"\{response_a\} is missing"),
        (DIRECT | {"evaluate": ASKS + " {response_a}"}, "evaluate", r"\{response_a\} occurs 2 times"),
        (
            DIRECT | {"evaluate": "{aspect}{response_b}{prompt}{response_a}"},
            "evaluate",
            "put them in prompt, response_a",
        ),
        (PAIRWISE | {"evaluate": ASKS}, "evaluate", r"does not ask for <answer>\[\[A\]\]</answer>"),
        (POINTWISE | {"evaluate": "{aspect} {prompt} {response} <s>"}, "evaluate", "does not ask for </s>"),
    ],
)
def test_what_is_wrong_is_named(values: dict, key: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, values)
    with pytest.raises(TemplateError, match=message) as error:
        load_template(path)
    assert str(error.value).startswith(f"template {path}, key '{key}': ") or isinstance(values["kind"], list)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "expected lines of `key: value`, found a list"),
        ("", "found a NoneType"),
        ("rate: [", "not valid YAML"),
        ("rate: a\nrate: b", "rate given more than once"),
        ("? [a]\n: b", "not valid YAML"),
        ("rate: !!python/object/apply:os.getpid []", "not valid YAML"),
    ],
)
def test_what_is_no_mapping(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=message):
        load_template(write(tmp_path, text))


def test_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"--template pairwize: neither a file .* did you mean pairwise\?"):
        load_template("pairwize")
    (tmp_path / "latin.yaml").write_bytes(b"rate: caf\xe9")
    with pytest.raises(TemplateError, match="neither a file that can be read"):
        load_template(str(tmp_path / "latin.yaml"))


def test_what_a_program_makes_need_not_ask_for_an_aspect() -> None:
    values = Template("check", "rate").to_dict()
    assert read_template(values, "") == Template("check", "rate")


@given(st.dictionaries(st.sampled_from(["prompt", "response_a", "response_b", "aspect"]), st.text(), min_size=4))
def test_places_are_filled_once(contents: dict[str, str]) -> None:
    for hostile in ("{response_b}", "{aspect}{prompt}"):
        given = contents | {"response_a": contents["response_a"] + hostile}
        text, places = fill(ASKS, given)
        assert text == f"Its {given['aspect']}: {given['prompt']} {given['response_a']} {given['response_b']}"
        assert {name: text[place] for name, place in places.items()} == given


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("So <answer>[[A]]</answer>", 0),
        ("<answer>[[A]]</answer> no, <answer> [[B]]\n</answer>.", 1),
        ("[[A]]", None),
        ("<answer>[[C]]</answer>", None),
        ("<answer>[[A]] [[B]]</answer>", None),
        ("<answer>[[a]]</answer>", None),
        ("<answer>[[B]]</answer> <answer>[[C]]</answer>", 1),
        ("", None),
    ],
)
def test_choices(text: str, choice: int | None) -> None:
    assert read_choice(text) == choice


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<s>7</s>", 7.0),
        ("<s> 7.5 </s>", 7.5),
        ("<s>3</s> or rather <s>0</s>", 0.0),
        ("<s>10</s>", 10.0),
        ("<s>11</s>", None),
        ("<s>4</s> <s>-1</s>", None),
        ("<s>seven</s>", None),
        ("<s>" + "9" * 400 + "</s>", None),
        ("7 of 10", None),
    ],
)
def test_scores(text: str, score: float | None) -> None:
    assert read_score(text) == score


@given(st.text(alphabet="<>/answers[]AB 0123456789.-\n"))
def test_verdicts_of_any_text(text: str) -> None:
    assert read_choice(text) in (0, 1, None)
    assert read_score(text) is None or 0 <= read_score(text) <= 10  # type: ignore[operator]
