"""A Hugging Face decoder over a tree of tokens, through transformers' attention registry: no model code is edited.

`attend_over_trees` gives a model an attention that is ours where the forward brings a `plan`, and otherwise the one it
had: sampling and padded batches go on as before. A tree needs no mask; positions are those of the unpacked sequences.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dwrl_fast import ops
from dwrl_fast.batch import Batch
from dwrl_fast.errors import ModelError, NotFiniteError
from dwrl_fast.log import info_once
from dwrl_fast.padded import PaddedBatch
from dwrl_fast.reference import Plan
from dwrl_fast.tree import TreeBatch

SUFFIX = "+tree"
ATTENDS = {"full_attention", "sliding_attention"}  # the kinds of layer that tree_attention computes
BATCHWISE_ROPE = {"dynamic", "longrope"}  # rotary frequencies that depend on the longest position of the batch
# What else transformers hands to an attention function; anything beyond these would be ignored, and so is refused.
WITHOUT_EFFECT = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
PROBE = ((3, 1, 4, 1, 5, 2), (3, 1, 4, 2, 6), (3, 1, 4, 1, 5, 6), (2, 6))
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the probe's states; a tree misread differs by 1
INSTEAD = "use --packing padded"


def backbone_states(backbone: nn.Module, batch: Batch) -> Tensor:
    """[positions, H]: the last hidden states of `batch`, flattened; its rows are indices into them."""
    if isinstance(batch, TreeBatch):
        return _tree_states(backbone, batch.input_ids, batch.position_ids, batch.plan)
    assert isinstance(batch, PaddedBatch)
    return _padded_states(backbone, batch.input_ids, batch.attention_mask)


def _tree_states(backbone: nn.Module, input_ids: Tensor, position_ids: Tensor, plan: Plan) -> Tensor:
    # A mask of four dimensions is handed through as it is: none is made.
    no_mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=input_ids.device)
    return backbone(
        input_ids=input_ids[None],
        attention_mask=no_mask,
        position_ids=position_ids[None],
        use_cache=False,
        plan=plan,
    ).last_hidden_state[0]


def _padded_states(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Padding is on the right, so positions are those of the sequence alone."""
    states = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def keep_softcap(lm: Any) -> None:
    """SDPA has no soft-cap. Until transformers raised there, it left Gemma 2's out in silence, and took SDPA by default
    (5.17 does): a model with one attends eagerly.
    """
    config = lm.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        lm.set_attn_implementation("eager")
        info_once(f"{type(lm).__name__}: eager attention, for SDPA would leave its soft-cap out")


def attend_over_trees(lm: Any, autocast: Callable[[], AbstractContextManager] = nullcontext) -> None:
    """Let the backbone of `lm` take a tree of tokens. Under `autocast` it must then say of a small tree what it says of
    its sequences one by one.

    Raises ModelError, naming model and reason, where it cannot; padded batches remain possible.
    """
    name, config = type(lm).__name__, lm.config.get_text_config()
    if reason := _hindrance(lm, config):
        raise ModelError(f"{name} cannot run on a tree of tokens: {reason}; {INSTEAD}")
    base = config._attn_implementation
    if not base.endswith(SUFFIX):
        _register(base)
        lm.set_attn_implementation(base + SUFFIX)
    _probe(lm, name, autocast)


def _hindrance(lm: Any, config: Any) -> str | None:
    """Why `lm` cannot run on a tree, from what it says of itself."""
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
    ropes = _rope_types(getattr(config, "rope_parameters", None)) & BATCHWISE_ROPE
    if ropes:
        return f"its rotary embedding ({', '.join(ropes)}) depends on the longest position of the batch"
    return None


def _rope_types(parameters: Any) -> set[str]:
    """Every rope_type in the config's rope parameters, which may stand under one key for each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    own = {parameters["rope_type"]} if "rope_type" in parameters else set()
    return own.union(*(_rope_types(value) for value in parameters.values()))


def _register(base: str) -> None:
    """An implementation of attention: `tree_attention` where a plan comes with it, otherwise `base`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        plan = options.pop("plan", None)
        if plan is not None:
            return _attention(module, query, key, value, plan, **options), None
        if base == "eager":  # not in the registry: each model's file has its own
            return sys.modules[type(module).__module__].eager_attention_forward(  # type: ignore[attr-defined]
                module, query, key, value, mask, **options
            )
        return ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, mask, **options)

    AttentionInterface.register(base + SUFFIX, attention)
    AttentionMaskInterface.register(base + SUFFIX, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Heads [1, heads, U, D] -> [1, U, Hq, D]. Raises ModelError on what tree_attention does not compute."""
    unknown = [k for k, v in others.items() if k not in WITHOUT_EFFECT and v is not None]
    unknown += ["dropout"] if dropout else []
    if unknown:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which a tree of tokens does not "
            f"have; {INSTEAD}"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return ops.tree_attention(q, k, v, plan, scale=scaling, softcap=softcap, window=sliding_window, sinks=s_aux)[None]


@torch.no_grad()
def _probe(lm: Any, name: str, autocast: Callable[[], AbstractContextManager]) -> None:
    """What no config tells: positions counted in the layout, states carried along it, keywords left unread."""
    device, training = lm.device, lm.training
    small = lm.get_input_embeddings().num_embeddings
    rows = [[i % small for i in row] for row in PROBE]
    # [3 1 4] is shared by three, [1 5] below it by two; the last row shares nothing.
    tree = SimpleNamespace(
        start=torch.tensor([0, 3, 5, 6, 7, 9]),
        stop=torch.tensor([3, 5, 6, 7, 9, 11]),
        parent=torch.tensor([-1, 0, 1, 1, 0, -1]),
    )
    plan = SimpleNamespace(**{k: v.to(device) for k, v in vars(tree).items()})
    ids = torch.tensor([*rows[0], rows[2][5], *rows[1][3:], *rows[3]], device=device)
    places = torch.tensor([0, 1, 2, 3, 4, 5, 5, 3, 4, 0, 1], device=device)
    where = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 7, 8], [0, 1, 2, 3, 4, 6], [9, 10]]
    lm.eval()
    with autocast():
        found = _tree_states(lm.base_model, ids, places, plan).float()
        for row, at in zip(rows, where, strict=True):
            one = torch.tensor([row], device=device)
            alone = _padded_states(lm.base_model, one, torch.ones_like(one)).float()
            if not alone.isfinite().all():
                raise NotFiniteError(
                    f"{name} gives states that are not finite even for one short sequence: its weights hold NaN or "
                    "infinities. Take a checkpoint from before, or copy the model again"
                )
            apart = ((found[at] - alone).norm() / alone.norm()).item()
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else lm.dtype
            if not apart <= ROUNDING.get(dtype, 0.1):
                raise ModelError(
                    f"{name} cannot run on a tree of tokens: on a small one its states differ by {apart:.1g} of their "
                    f"size from those of the sequences alone, so it computes something across tokens that follows the "
                    f"layout; {INSTEAD}"
                )
    lm.train(training)
