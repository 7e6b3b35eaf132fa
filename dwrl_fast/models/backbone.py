"""Runs a Hugging Face decoder on a tree of tokens through transformers' attention registry, without changes to model
code.

`attend_over_trees` replaces a model's attention: a forward pass with a `plan` uses `tree_attention`, any other pass
uses the original attention, so sampling and padded batches work as before. A tree needs no mask; positions are those of
the unpacked sequences.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.padded import PaddedBatch
from dwrl_fast.batching.tree import TreeBatch
from dwrl_fast.errors import ModelError
from dwrl_fast.log import info_once
from dwrl_fast.ops.oracle import Plan
from dwrl_fast.sampling.cache import CachedPlan

SUFFIX = "+tree"
ATTENDS = {"full_attention", "sliding_attention"}  # the kinds of layers that tree_attention supports
# Further keywords that transformers passes to an attention function. Any other keyword would be ignored, so it is
# refused.
WITHOUT_EFFECT = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}


def backbone_states(backbone: nn.Module, batch: Batch) -> Tensor:
    """[positions, H]: the last hidden states of `batch`, flattened. Its `token_rows` and `score_rows` index them."""
    if isinstance(batch, TreeBatch):
        return planned_states(backbone, batch.input_ids, batch.position_ids, batch.plan)
    assert isinstance(batch, PaddedBatch)
    # Padding is on the right, so positions are the same as for the sequence alone.
    states = backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return states.last_hidden_state.flatten(0, 1)


def planned_states(backbone: nn.Module, ids: Tensor, positions: Tensor, plan: Plan | CachedPlan) -> Tensor:
    """[U, H]: the last hidden states of the tokens `ids` [U] at `positions` [U] of their texts. `plan` defines what
    they attend to.
    """
    # A mask of four dimensions is passed through unchanged, so transformers creates none.
    no_mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=ids.device)
    return backbone(
        input_ids=ids[None], attention_mask=no_mask, position_ids=positions[None], use_cache=False, plan=plan
    ).last_hidden_state[0]


def keep_softcap(lm: Any) -> None:
    """Use eager attention for a model with a soft-cap in its attention (Gemma 2), because SDPA does not support it.
    transformers 5.17 uses SDPA by default there and silently ignores the soft-cap; later versions raise an error.
    """
    config = lm.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        lm.set_attn_implementation("eager")
        info_once(f"{type(lm).__name__}: eager attention, because SDPA would ignore its soft-cap")


def rotary_limit(lm: Any) -> int | None:
    """The longest sequence, in tokens, for which the rotary factors of `lm` do not depend on the batch; None if they
    never do. For longer sequences, dynamic NTK and LongRoPE use the factors of the batch's longest sequence for all
    sequences.
    """
    config = lm.config.get_text_config()
    limits = {
        "dynamic": lambda rope: config.max_position_embeddings,
        "longrope": lambda rope: rope["original_max_position_embeddings"],
    }
    ropes = _ropes(getattr(config, "rope_parameters", None))
    return min((limits[rope["rope_type"]](rope) for rope in ropes if rope["rope_type"] in limits), default=None)


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """The rope parameters of a config, which may have one entry for each kind of layer."""
    if not isinstance(parameters, dict):
        return []
    own = [parameters] if "rope_type" in parameters else []
    return own + [rope for value in parameters.values() for rope in _ropes(value)]


def keep_rotary(lm: Any) -> None:
    """Make every forward pass of `lm` raise ModelError for a sequence longer than `rotary_limit`, in every layout and
    in sampling, because a score would depend on the other sequences of its batch.
    """
    limit = rotary_limit(lm)
    if limit is None:
        return

    def check(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        positions = options["position_ids"] if "position_ids" in options else args[1]
        if positions.amax() >= limit:
            refuse_past_rotary(lm, int(positions.amax()) + 1)

    for module in lm.base_model.modules():
        if hasattr(module, "rope_type"):
            module.register_forward_pre_hook(check, with_kwargs=True)


def refuse_past_rotary(lm: Any, longest: int) -> None:
    """Raise ModelError if a sequence of `longest` tokens is longer than `rotary_limit`."""
    limit = rotary_limit(lm)
    if limit is not None and longest > limit:
        raise ModelError(
            f"a sequence of {longest} tokens: the rotary embedding of {type(lm).__name__} is the same in every batch "
            f"only up to {limit} tokens; past that, scores would depend on the other sequences of the batch. Lower "
            f"--max_length and --max_completion_length to {limit} tokens together"
        )


def attend_over_trees(lm: Any) -> None:
    """Prepare the backbone of `lm` for trees of tokens (`TreeBatch`).

    Raises ModelError with the reason if its configuration shows that this is impossible. trial.py finds other
    obstacles.
    """
    config = lm.config.get_text_config()
    if reason := _hindrance(lm, config):
        raise ModelError(reason)
    base = config._attn_implementation
    if not base.endswith(SUFFIX):
        _register(base)
        lm.set_attn_implementation(base + SUFFIX)


def attend_as_before(lm: Any) -> None:
    """Undo `attend_over_trees`."""
    base = lm.config.get_text_config()._attn_implementation
    if base.endswith(SUFFIX):
        lm.set_attn_implementation(base.removesuffix(SUFFIX))


def _hindrance(lm: Any, config: Any) -> str | None:
    """The reason in its configuration why `lm` cannot run on a tree; None if there is none."""
    if not lm._can_set_attn_implementation():
        return "its attention is not taken from transformers' registry"
    if config._attn_implementation.removesuffix(SUFFIX) not in ("sdpa", "eager"):
        return f"it was loaded with attn_implementation={config._attn_implementation!r} (sdpa or eager are possible)"
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENDS
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}, which carry state along the packed tokens"
    if getattr(config, "attention_chunk_size", None):
        return f"it attends in chunks (attention_chunk_size = {config.attention_chunk_size})"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "its attention is not causal"
    return None


def _register(base: str) -> None:
    """Register an attention implementation: `tree_attention` if a plan is passed, otherwise `base`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        plan = options.pop("plan", None)
        if plan is not None:
            return _attention(module, query, key, value, plan, **options), None
        if base == "eager":  # not in the registry: each model file has its own
            return sys.modules[type(module).__module__].eager_attention_forward(  # type: ignore[attr-defined]
                module, query, key, value, attention_mask, **options
            )
        return ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, attention_mask, **options)

    AttentionInterface.register(base + SUFFIX, attention)
    AttentionMaskInterface.register(base + SUFFIX, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan | CachedPlan,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Heads [1, heads, U, D] -> [1, U, Hq, D]. Raises ModelError for arguments that tree_attention does not support."""
    unknown = [k for k, v in others.items() if k not in WITHOUT_EFFECT and v is not None]
    unknown += ["dropout"] if dropout else []
    if unknown:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which a tree of tokens does not "
            "support"
        )
    if sliding_window is None and _slides(module):
        raise ModelError(
            f"{type(module).__name__} has a sliding window in its mask alone, and a tree of tokens has no such mask"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "window": sliding_window, "sinks": s_aux}
    if isinstance(plan, CachedPlan):
        return plan.attend(module.layer_idx, q, k, v, **options)[None]
    return ops.tree_attention(q, k, v, plan, **options)[None]


def _slides(module: Any) -> bool:
    """Whether the layer of this attention has a sliding window by its configuration."""
    config = getattr(module, "config", None)
    if kinds := getattr(config, "layer_types", None):
        return bool(kinds[module.layer_idx] == "sliding_attention")
    return bool(getattr(config, "sliding_window", None))
