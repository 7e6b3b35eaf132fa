"""Tries on a few tokens what a model can do, before training. Configurations do not tell everything.

The result of a layout is compared with each sequence alone, and the sampler's log-probs with the trainer's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.layout import Layout, Packing
from dwrl_fast.compute import Compute
from dwrl_fast.data import Preference
from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode import Group
from dwrl_fast.errors import ModelError, NotFiniteError, UserError
from dwrl_fast.log import info_once
from dwrl_fast.models.backbone import attend_as_before, attend_over_trees, backbone_states
from dwrl_fast.sampling import Limits, Sampler, TransformersSampler, TreeSampler

# Three rows share three tokens, two of them five; the last row shares nothing and is shorter.
ROWS = ((3, 1, 4, 1, 5, 2), (3, 1, 4, 2, 6), (3, 1, 4, 1, 5, 6), (2, 6))
# Bounds for rounding: relative, of hidden states; and in nats per token, of log-probs of a thought. A fault changes
# about 1.
STATES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
NATS = {torch.float32: 1e-3, torch.bfloat16: 0.5}
WITHOUT_THOUGHTS = "gram, genrm, sft and dpo write none"


def admit(model: Any, packing: Packing, pad_id: int, compute: Compute, *, thinks: bool, trains: bool) -> bool:
    """Prepare `model`, which is on its device, for batches of `packing`, and try it on a few tokens: its head, if it
    `trains` its training mode, the layout and, if it `thinks`, sampling. Returns whether it can sample with a shared
    cache (`TreeSampler`). If not, this is logged, and each thought gets its own cache.

    Raises ModelError, with the reason and a remedy that was tried, if it cannot run, and NotFiniteError if its weights
    hold NaN.
    """
    lm, name = model.lm, type(model.lm).__name__
    pad_id %= lm.get_input_embeddings().num_embeddings  # the fit of the tokenizer is checked elsewhere
    with _trying(lm), compute.autocast():
        try:
            alone = _alone(lm)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ModelError(
                f"{name} cannot compute even a short sequence: {error}. Correct its config.json"
            ) from error
        if unlike := _head_fault(model, alone) or (_training_fault(lm, alone) if trains else None):
            raise ModelError(f"{name} cannot be used here: {unlike}. Use another model (Llama, Qwen, Mistral, Gemma)")
        padded = _fault(lambda: _layout_fault(lm, "padded", pad_id, alone))
        shape: Packing = "tree" if packing == "padded" else packing
        flat = _fault(lambda: _tree_fault(lm, shape, pad_id, alone)) if thinks or packing != "padded" else None
        if flat:
            attend_as_before(lm)
        packed = padded if packing == "padded" else flat
        works: Packing = "padded" if packed else packing
        tried = thinks and not (packed and padded)
        sharing = flat or _fault(lambda: _sampler_fault(model, works, pad_id, compute, sharing=True)) if tried else ""
        writing = _fault(lambda: _sampler_fault(model, works, pad_id, compute)) if sharing else None
    if packed and padded:
        raise ModelError(
            f"{name} cannot be used here, because it works in no layout: {packed}; padded: {padded}. Use another model"
        )
    also = " with --packing padded" if packed else ""
    if writing:
        raise ModelError(
            f"{name} cannot write thoughts here: {writing}. Use another model, or a method without thoughts{also} "
            f"({WITHOUT_THOUGHTS})"
        )
    if packed:
        raise ModelError(f"{name} cannot run on a tree of tokens: {packed}; use --packing padded, which works")
    if sharing:
        info_once(f"{name} gets a separate cache for each thought, without shared prefixes: {sharing}")
    return thinks and not sharing


def output_difference(saved: Any, model: Any) -> str | None:
    """In words, how the logits (or rewards) of `saved` differ from those of `model` on a few tokens; None if they
    differ only by rounding.

    They count as different if they differ at most of the tokens: a wrong weight changes all of them, while rounding may
    send single tokens to a different expert.
    """
    one, other = (_outputs(each.lm) for each in (saved, model))
    apart, size = (one - other).norm(dim=-1), other.norm(dim=-1)
    same = apart <= STATES.get(model.lm.dtype, STATES[torch.bfloat16]) * size
    if 2 * same.sum() > len(same):
        return None
    return f"on a few tokens the output of its head, of size {size.median():.1g}, differs by {apart.median():.1g}"


def _outputs(lm: Any) -> Tensor:
    """The outputs of the head: [positions, V], or [positions, 1] for a scalar head, in float32 on the CPU."""
    head = lm.get_output_embeddings() or lm.score
    with _trying(lm):
        return head(_alone(lm).to(head.weight.dtype)).float().cpu()


@contextmanager
def _trying(lm: Any, training: bool = False) -> Iterator[None]:
    """A context without gradients in which `lm` is in evaluation or training mode."""
    before = lm.training
    lm.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        lm.train(before)


def _fault(attempt: Callable[[], str | None]) -> str | None:
    """The fault, in words; None if there is none. Model code may raise any error for inputs that it does not
    support.
    """
    try:
        return attempt()
    except (NotFiniteError, torch.OutOfMemoryError):
        raise
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"it raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _rows(lm: Any) -> list[list[int]]:
    small = lm.get_input_embeddings().num_embeddings
    return [[i % small for i in row] for row in ROWS]


def _alone(lm: Any) -> Tensor:
    """[positions, H] in float32: the hidden states of every row, each computed alone, one after another."""
    found = []
    for row in _rows(lm):
        ids = torch.tensor([row], device=lm.device)
        found.append(lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float())
        _check_finite(found[-1], lm, "states")
    return torch.cat(found)


def _check_finite(values: Tensor, lm: Any, what: str) -> None:
    if not values.isfinite().all():
        raise NotFiniteError(
            f"{type(lm).__name__} gives {what} that are not finite even for one short sequence: its weights hold "
            "NaN or infinities, or its activations overflow. Use an earlier checkpoint, or copy the model again"
        )


def _head_fault(model: Any, alone: Tensor) -> str | None:
    """Compare the logits of a generative model's own forward pass with those of its head over the hidden states."""
    if not hasattr(model, "head"):
        return None
    ids = torch.tensor(_rows(model.lm)[:1], device=model.lm.device)
    expected = model.lm(input_ids=ids, use_cache=False).logits[0].float()
    _check_finite(expected, model.lm, "logits")
    states = alone[: len(expected)].to(model.lm.get_output_embeddings().weight.dtype)
    found = model.head(states, states[:0]).logits(states)
    apart = ((found - expected).norm() / expected.norm()).item()
    if not apart <= _allowed(STATES, model.lm):
        return (
            f"on a few tokens its logits differ by {apart:.1g} of their size from the product of its last hidden "
            "states and its head's weight, which is what the fused operators compute"
        )
    return None


def _training_fault(lm: Any, alone: Tensor) -> str | None:
    with _trying(lm, training=True):
        apart = ((_alone(lm) - alone).norm() / alone.norm()).item()
    if not apart <= _allowed(STATES, lm):
        return (
            f"in training mode its states differ by {apart:.1g} of their size, because its layers add noise or "
            "compute otherwise there; it can only be evaluated"
        )
    return None


def _batch(lm: Any, rows: list[list[int]], starts: list[int], packing: Packing, pad_id: int) -> Batch:
    """One micro-batch of `rows`; the tokens of each from its `starts` on are marked as trained."""
    none = slice(0)
    spans = [TokenSequence(row, none, none, slice(at, len(row)), none) for row, at in zip(rows, starts, strict=True)]
    layout = Layout(packing, 10**6, pad_id, lm.device)
    (batch,) = layout.batches([Group(Preference((), ("",)), [spans])])
    return batch


def _layout_fault(lm: Any, packing: Packing, pad_id: int, alone: Tensor) -> str | None:
    rows = _rows(lm)
    batch = _batch(lm, rows, [1] * len(rows), packing, pad_id)
    states = backbone_states(lm.base_model, batch).float()
    steps = batch.token_rows.split(batch.lengths.tolist())
    places = [torch.cat([some, last[None]]) for some, last in zip(steps, batch.score_rows, strict=True)]
    for place, one in zip(places, alone.split([len(row) for row in rows]), strict=True):
        found = states[place]
        apart = ((found - one).norm() / one.norm()).item()
        if not apart <= _allowed(STATES, lm):
            return (
                f"on a few tokens its states differ by {apart:.1g} of their size from those of each sequence alone, "
                "so a part of the model that works across tokens depends on the layout"
            )
    return None


def _tree_fault(lm: Any, packing: Packing, pad_id: int, alone: Tensor) -> str | None:
    attend_over_trees(lm)
    return _layout_fault(lm, packing, pad_id, alone)


def _sampler_fault(model: Any, packing: Packing, pad_id: int, compute: Compute, *, sharing: bool = False) -> str | None:
    """Compare the sampler's log-probs of two thoughts for each of several contexts of different lengths with the
    trainer's log-probs of the same ids.
    """
    lm = model.lm
    how: dict[str, Any] = {"autocast": compute.autocast, "float32": compute.float32}
    sampler: Sampler
    if sharing:
        sampler = TreeSampler(model, [], limits=Limits(8, 4.0), token_budget=64, **how)
    else:
        sampler = TransformersSampler(lm, [], pad_id, batch_size=8, **how)
    contexts = [row for row in _rows(lm)[1:] for _ in range(2)]
    sampled = sampler.sample(contexts[::2], 2, max_tokens=3, temperature=1.0, seed=0)
    thoughts = [thought for each in sampled for thought in each]
    rows = [[*context, *thought.ids] for context, thought in zip(contexts, thoughts, strict=True)]
    batch = _batch(lm, rows, [len(context) for context in contexts], packing, pad_id)
    head = model(batch, tokens=True)
    trained = ops.linear_logprob(head.token, head.weight, batch.targets, bias=head.bias, softcap=head.softcap)
    said = torch.tensor([logprob for thought in thoughts for logprob in thought.logprobs], device=lm.device)
    apart = (trained - said).abs().unflatten(0, (len(rows), -1)).mean(-1).amax().item()
    if not apart <= _allowed(NATS, lm):
        return f"log-probs in sampling differ by {apart:.2g} nats from those of the forward pass"
    return None


def _allowed(bounds: dict[torch.dtype, float], lm: Any) -> float:
    device = lm.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm.dtype
    return bounds.get(dtype, bounds[torch.bfloat16])
