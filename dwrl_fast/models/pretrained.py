"""Models on disk: a plain Hugging Face folder, with the dialog and the labels in a small JSON file, the card."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError

from dwrl_fast.dialog import DEFAULT_ASPECT, Dialog, SingleTurn, Thinking, named_aspect
from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.files import bounded_json, check_folder
from dwrl_fast.models import gguf
from dwrl_fast.models.adapters import adapted, plain, write_adapter
from dwrl_fast.models.liger import without_liger
from dwrl_fast.models.model import GenerativeModel, PreferenceModel, load_generative, load_scalar, quiet
from dwrl_fast.models.trial import output_difference
from dwrl_fast.templates import DEFAULT, load_template

CARD = "preference_model.json"


def load_tokenizer(name_or_path: str) -> Any:
    """A tokenizer from a folder, hub name or GGUF file. Code that comes with it is not run."""
    from transformers import AutoTokenizer

    with gguf.source(name_or_path) as (path, keywords):
        try:
            check_folder(path)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **keywords)
        except Exception as error:  # the libraries below raise anything where a file is damaged
            needs = (
                gguf.NEEDS
                if keywords
                else "It needs a folder with tokenizer.json, tokenizer_config.json and a valid config.json, or a hub "
                "name while the hub can be reached (in training another may be given by --tokenizer_name_or_path)."
            )
            raise ModelError(f"cannot load a tokenizer from {name_or_path!r}. {needs}\n  {error}") from error
    if keywords:
        gguf.check_split(tokenizer, name_or_path)
    return tokenizer


def load_chat(
    model: str | None,
    tokenizer: str,
    kind: str | None = None,
    *,
    template: str | None,
    aspect: str | None,
    enable_thinking: Thinking,
) -> Dialog | SingleTurn:
    """The builder of sequences. Settings come from the arguments, then from the card of `model` if its template has
    this kind, then from the packaged template of that kind. kind: None: that of the card, otherwise dialog.
    """
    saved = load_card(model)["dialog"] if has_card(model) else {}
    kind = kind or saved.get("template", {}).get("kind", DEFAULT)
    saved = {"aspect": DEFAULT_ASPECT} | saved | asked_about(aspect)
    saved |= {} if enable_thinking == "auto" else {"enable_thinking": enable_thinking}
    if template is None and "template" in saved and saved["template"].get("kind", DEFAULT) == kind:
        return (Dialog if kind == "dialog" else SingleTurn).from_dict(load_tokenizer(tokenizer), saved)
    chosen = load_template(template or kind)
    make = Dialog if chosen.kind == "dialog" else SingleTurn
    return make(
        load_tokenizer(tokenizer),
        chosen,
        named_aspect(saved),
        saved.get("enable_thinking", "auto"),
    )


def asked_about(aspect: str | None) -> dict[str, Any]:
    """The changes of a saved dialog for the option --aspect."""
    return {} if aspect is None else {"aspect": aspect, "aspect_named": True}


def save_pretrained(folder: Path, model: PreferenceModel, dialog: Dialog | SingleTurn, card: dict[str, Any]) -> None:
    """Replace `folder` by the current model: config, safetensors, tokenizer and card. With adapters, `folder` gets the
    merged model, and the folder `adapter` next to it the adapters alone.

    The written model is loaded again and must compute the same as the model. Otherwise ModelError is raised; the new
    folder then stays as FOLDER.part, and the old one is unchanged. Also raises ModelError if writing fails.
    """
    try:
        _save(folder, model, dialog, card)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the model cannot be saved in {folder}: {error}. Make room there; a run that is resumed from its last "
            "checkpoint (--resume_from_checkpoint latest) then saves it"
        ) from error


def _save(folder: Path, model: PreferenceModel, dialog: Dialog | SingleTurn, card: dict[str, Any]) -> None:
    lm: Any = model.lm
    quiet()
    _replace(folder, plain(lm).save_pretrained, model, dialog, card)
    if adapted(lm):
        _replace(folder.with_name("adapter"), partial(write_adapter, lm=lm), model, dialog, card)


def try_saving(folder: Path, model: PreferenceModel, dialog: Dialog | SingleTurn, card: dict[str, Any]) -> None:
    """Save the model once in the place of `folder` and remove it again, so that a model that cannot be saved is found
    before training. Raises ModelError like `save_pretrained`, and ConfigError if writing fails.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=there) as trial:
            _save(Path(trial) / "model", model, dialog, card)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the model cannot be saved in {there}: {error}. Make room, or give another folder"
        ) from error


def _replace(
    folder: Path,
    write: Callable[[Path], object],
    model: PreferenceModel,
    dialog: Dialog | SingleTurn,
    card: dict[str, Any],
) -> None:
    """Replace `folder` by the files that `write` writes, with tokenizer and card.

    The new folder is written next to `folder`, compared with `model`, and renamed. If the process is killed between two
    renames, the new folder is FOLDER.part and the old one is FOLDER.old.
    """
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    dialog.tokenizer.save_pretrained(part)
    (part / CARD).write_text(json.dumps(card | {"dialog": dialog.to_dict()}, indent=2) + "\n", encoding="utf-8")
    for file in part.iterdir():  # safetensors makes files readable only for their owner
        file.chmod((part / CARD).stat().st_mode)
    _compare(part, model)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def _compare(folder: Path, model: PreferenceModel) -> None:
    """Raise ModelError if the model in `folder` gives different logits, or rewards, than `model`."""
    with without_liger():  # what was saved is read on the CPU, as is the whole copy of a sharded model
        if isinstance(model, GenerativeModel):
            saved: PreferenceModel = load_generative(str(folder), None, 0)
        else:
            saved = load_scalar(str(folder), None, 0, model.lm.config.pad_token_id)
        apart = output_difference(saved, model)
    if apart:
        raise ModelError(
            f"what was saved in {folder} is not the model that was trained: {apart}. The folder is kept for "
            "inspection; it replaced nothing, and the checkpoints hold the trained weights"
        )


def has_card(folder: str | Path | None) -> TypeGuard[str | Path]:
    """Whether `folder` holds a model trained by this package."""
    return folder is not None and (Path(folder) / CARD).is_file()


def load_card(folder: str | Path) -> dict[str, Any]:
    """The card of a trained model. Raises ModelError if there is none or it cannot be read."""
    path = Path(folder) / CARD
    if has_card(Path(folder) / "model"):
        raise ModelError(f"{folder} is a run's folder: give {Path(folder) / 'model'}, which holds its model")
    if not path.is_file():
        raise ModelError(
            f"{folder} has no {CARD}, so it was not written by dwrl_fast.train, which saves it next to the weights in "
            "OUTPUT_DIR/model. Give that folder; dwrl_fast.evaluate can ask any other causal language model, with "
            '--method judge (in Python method="judge").'
        )
    try:
        return dict(bounded_json(path))
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as a model's card: copy it again from where the model was trained.\n  {error}"
        ) from None
