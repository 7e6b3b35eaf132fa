"""Loads the dialog of a run, of a model trained with this package, or of any other model as a judge."""

import math
from pathlib import Path
from typing import Any

from dwrl_fast.config import TrainConfig
from dwrl_fast.data.mixture import Part
from dwrl_fast.dialog import Dialog, SingleTurn, Thinking
from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.methods import METHODS
from dwrl_fast.models.pretrained import CARD, asked_about, has_card, load_card, load_chat, load_tokenizer
from dwrl_fast.options import checked
from dwrl_fast.templates import DEFAULT


def load_dialog(config: TrainConfig) -> Dialog | SingleTurn:
    """The builder of sequences of a run. A model trained with this package provides its own settings, which options
    override.
    """
    method = METHODS[config.method]
    source = config.tokenizer_name_or_path or config.model_name_or_path
    if source is None:
        source = str(Path(config.model_config or "").parent)
    if has_card(config.model_name_or_path) and (not method.scalar or config.prefilled_thoughts):
        card = load_card(config.model_name_or_path)
        if METHODS[card["method"]].scalar:
            raise ModelError(
                f"{config.model_name_or_path} was trained by {card['method']} and has a scalar head instead of a "
                f"language model's head, which {'prefilled_thoughts' if method.scalar else config.method} needs: "
                "start from the model that its own training started from"
            )
    chat = load_chat(
        config.model_name_or_path,
        source,
        method.template,
        template=config.template,
        aspect=config.aspect,
        enable_thinking=config.enable_thinking,
    )
    kinds = (method.template, *method.other_templates)
    if chat.template.kind not in kinds:
        raise ConfigError(
            f"template = {config.template}: its kind is {chat.template.kind}, and {config.method} judges by one of "
            f"kind {' or '.join(kinds)}. Give such a template, or none."
        )
    return chat


def load_trained(folder: str | Path, aspect: str | None = None) -> tuple[Dialog | SingleTurn, dict[str, Any]]:
    """The dialog and the card of a model that `save_pretrained` wrote."""
    card = load_card(folder)
    try:
        _check_card(card)
    except ConfigError as error:
        raise ModelError(
            f"the card of {folder} is not valid: {error} Copy {CARD} again from where the model was trained"
        ) from None
    saved = card["dialog"] | asked_about(aspect)
    make = Dialog if saved["template"].get("kind", DEFAULT) == "dialog" else SingleTurn
    return make.from_dict(load_tokenizer(str(folder)), saved), card


def _check_card(card: dict[str, Any]) -> None:
    """Raise ConfigError if a card lacks a value that its method needs, or if a value has a wrong type or is out of
    range.
    """
    if str(card.get("method")) not in METHODS:
        raise ConfigError(f"its method is {card.get('method')!r}, which is not one of {', '.join(METHODS)}.")
    options = [*METHODS[str(card["method"])].card_options, *["max_completion_length"] * ("prefilled_by" in card)]
    if absent := [name for name in ("dialog", *options) if card.get(name) is None]:
        raise ConfigError(f"it has no {', '.join(absent)}.")
    texts = {name for name in options if isinstance(card[name], str)} - {"score_normalization"}
    if texts:
        raise ConfigError(f"{', '.join(sorted(texts))}: must be a number, but is text.")
    checked(TrainConfig, {name: card[name] for name in options}, "the card")
    calibration = card.get("calibration", {"temperature": 1.0})
    shapes = {"dialog": dict, "prefilled_by": str, "reference": dict, "calibration": dict}
    for name, kind in shapes.items():
        if not isinstance(card.get(name, kind()), kind):
            raise ConfigError(f"{name} = {card[name]!r}: must be {'text' if kind is str else 'a mapping'}.")
    if not isinstance(card["dialog"].get("template"), dict) or not isinstance(card["dialog"].get("aspect"), str):
        raise ConfigError("dialog: must hold a template, a mapping, and an aspect, a text.")
    if not (isinstance(fitted := calibration.get("temperature"), int | float) and 0 < fitted < math.inf):
        raise ConfigError(f"calibration, temperature = {fitted!r}: must be a number > 0.")


def load_judge(
    method: str, name_or_path: str, *, template: str | None, aspect: str | None, enable_thinking: Thinking
) -> tuple[Dialog | SingleTurn, dict[str, Any]]:
    """The dialog for any causal language model under `method`, which trains nothing, and a card for it."""
    config = TrainConfig(
        method=method,
        model_name_or_path=name_or_path,
        eval_dataset_name=(Part(name_or_path),),  # the options require evaluation data; this value is not read
        template=template,
        aspect=aspect,
        enable_thinking=enable_thinking,
    )
    limits = {"max_completion_length": config.max_completion_length, "temperature": config.temperature}
    return load_dialog(config), {"method": config.method} | limits
