"""Template, aspect and thinking of a run come from the options, then from the saved model, then from the defaults."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from chats import LETTERS, merging
from tiny import tiny_dialog, tiny_folder

from dwrl_fast.config import parse_train
from dwrl_fast.dialog import Dialog, SingleTurn, Template
from dwrl_fast.errors import ConfigError, TemplateError
from dwrl_fast.models.pretrained import CARD, load_chat
from dwrl_fast.scoring.loading import load_dialog, load_trained
from dwrl_fast.training.identity import identity

NOTHING: dict[str, Any] = {"template": None, "aspect": None, "enable_thinking": "auto"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("saved") / "model"))


def test_a_saved_model_brings_its_own(model: str) -> None:
    chat = load_chat(model, model, **NOTHING)
    assert isinstance(chat, Dialog) and chat.to_dict() == tiny_dialog().to_dict()
    assert load_chat(model, model, **NOTHING | {"aspect": "speed"}).aspect == "speed"


def test_the_template_given_goes_first(model: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"evaluate": "check {aspect}", "rate": "rate", "labels": ["No", "Yes"]}))
    chat = load_chat(model, model, **NOTHING | {"template": str(mine)})
    assert chat.template == Template("check {aspect}", "rate", ("No", "Yes"))
    assert chat.aspect == "correctness", "the model's own still"


def test_a_saved_model_tells_whether_its_aspect_was_named(model: str, tmp_path: Path) -> None:
    """Helpfulness that somebody named chooses labels, and helpfulness as the default does not."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"evaluate": "check {aspect}", "rate": "rate", "labels": ["No", "Yes"]}))
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    card = json.loads((folder / CARD).read_text())

    def save(dialog: dict[str, Any]) -> None:
        (folder / CARD).write_text(json.dumps(card | {"dialog": card["dialog"] | dialog}))

    def loaded(aspect: str | None = None) -> list[tuple[str, str | None]]:
        options = NOTHING | {"aspect": aspect}
        other = options | {"template": str(mine)}
        chats = [load_chat(str(folder), model, **options), load_chat(str(folder), model, **other)]
        return [(chat.aspect, chat.named_aspect) for chat in (*chats, load_trained(folder, aspect)[0])]

    for aspect, named in ((None, False), ("helpfulness", True), ("tact", False)):
        made = Dialog(tiny_dialog().tokenizer, tiny_dialog().template, aspect)
        assert ("aspect_named" in made.to_dict()) == named
        save(made.to_dict())
        assert loaded() == [(aspect or "helpfulness", aspect)] * 3
        assert loaded("helpfulness") == [("helpfulness", "helpfulness")] * 3
    save({"aspect": "helpfulness"})  # as models were saved before
    assert loaded() == [("helpfulness", None)] * 3


def test_a_run_continues_whether_or_not_its_aspect_was_named(model: str) -> None:
    """Its rows tell whether the labels are the same."""
    config = parse_train(["--model_name_or_path", model, "--dataset_name", "x.jsonl"])
    parts = tiny_dialog().tokenizer, tiny_dialog().template
    one, two = (identity(config, "rows", 1, Dialog(*parts, aspect), "") for aspect in (None, "helpfulness"))
    assert one == two != identity(config, "rows", 1, Dialog(*parts, "tact"), "")


def test_without_a_card_the_defaults(tmp_path: Path) -> None:
    merging("hi").save_pretrained(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(LETTERS.to_dict() | {"evaluate": "is it good? {aspect}"}))
    chat = load_chat(None, str(tmp_path), **NOTHING | {"template": str(mine)})
    assert (chat.aspect, chat.named_aspect, chat.enable_thinking) == ("helpfulness", None, "off")
    with pytest.raises(TemplateError, match="label 'Yes'"):
        load_chat(None, str(tmp_path), **NOTHING)


def test_a_saved_single_turn_comes_back(model: str, tmp_path: Path) -> None:
    template = Template("compare {prompt} A {response_a} B {response_b}", labels=None, kind="pairwise")
    made = SingleTurn(tiny_dialog().tokenizer, template, "correctness")
    (tmp_path / CARD).write_text(json.dumps({"method": "dwrl", "dialog": made.to_dict()}))
    again = load_chat(str(tmp_path), model, **NOTHING)
    assert isinstance(again, SingleTurn) and again.to_dict() == made.to_dict()
    argv = ["--model_name_or_path", str(tmp_path), "--tokenizer_name_or_path", model, "--dataset_name", "x.jsonl"]
    argv += ["--template", "pairwise"]
    with pytest.raises(ConfigError, match="kind is pairwise, and dwrl judges by one of kind dialog"):
        load_dialog(parse_train(argv))


def test_the_embedded_task_has_its_own() -> None:
    for argv in (["--template", "pairwise"], ["--enable_thinking", "on"]):
        with pytest.raises(ConfigError, match=r"without dataset_name"):
            parse_train(argv)
