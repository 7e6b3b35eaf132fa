"""Yields the weights of a model in the form of an exported model, one by one, for a sampling engine."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dwrl_fast.errors import ModelError
from dwrl_fast.models.adapters import dequantized, merged
from dwrl_fast.models.sharding import Sharded


def exported(model: Any, sharded: Sharded | None, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names and weights in `dtype`, with adapters merged and tied weights once. At most one weight and the adapters of
    one layer are held at a time. With sharded weights, all ranks iterate together.
    """
    named: Iterable[tuple[str, Tensor]] = dequantized(model.lm)
    if sharded is not None:
        model = sharded.skeleton
        named = ((name.removeprefix("lm."), weight) for name, weight in sharded.gathered())
    for name, weight in merged(model.lm, named):
        yield name, weight.to(dtype)


def check_exported_names(lm: Any) -> None:
    """Raise ModelError if an exported model has different weight names than the trained model, as some mixtures of
    experts have.
    """
    from transformers.core_model_loading import revert_weight_conversion

    named = {name: torch.empty(p.shape, device="meta") for name, p in lm.named_parameters() if ".lora_" not in name}
    named = {name.replace(".base_layer.", "."): weight for name, weight in named.items()}
    try:
        same = set(revert_weight_conversion(lm, dict(named))) == set(named)
    except Exception:  # in conversions, which other models do not use
        same = False
    if not same:
        raise ModelError(
            f"--use_vllm: {type(lm).__name__} has different weight names in its files and in memory, and this package "
            "cannot send such weights to vLLM. Leave --use_vllm out."
        )
