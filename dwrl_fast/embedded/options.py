"""The options of a run on the embedded task."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from dwrl_fast import embedded
from dwrl_fast.config import TrainConfig
from dwrl_fast.data.mixture import Part
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods import METHODS

Config = TypeVar("Config", bound=TrainConfig)


def embedded_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the embedded task for the given method; empty if data are given."""
    if given.get("dataset_name") is not None or given.get("dataset_mixture"):
        return {}
    method = METHODS[given.get("method", TrainConfig.method)]
    if not method.trains:  # the embedded task cannot use it
        return {}
    path = embedded.recipe(method.embedded_recipe(dict(given)))
    if not path.exists():
        raise ConfigError(
            f"the embedded task has no recipe for --method {method.name}: give a model and data of your own "
            "(--model_name_or_path, --dataset_name, --eval_dataset_name)"
        )
    recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "rationalizer_template" in recipe:  # a file next to the recipe
        recipe["rationalizer_template"] = str(path.with_name(recipe["rationalizer_template"]))
    return recipe


def on_embedded(config: Config, made: embedded.Embedded) -> Config:
    """The same options with the files of the embedded task."""
    return dataclasses.replace(
        config,
        model_name_or_path=str(made.model_for(METHODS[config.method].template)),
        dataset_name=str(made.train),
        eval_dataset_name=(Part(str(made.test)),),
        explicit=frozenset(),
    )
