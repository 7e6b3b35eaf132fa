"""A model sharded over ranks with PyTorch's FSDP2, and its unsharded copies.

Each layer is a unit; units are gathered one after another. Embedding, norm and head belong to the root unit, whose
weights stay gathered from the forward pass to the end of the backward pass, because the fused head reads them.
Gradients are summed over ranks: a loss is divided by the size of the global minibatch.

Thoughts are never sampled with the sharded model, because ranks would wait for each other at every token. A rank that
samples has a whole copy in the run's dtype, the replica. `refresh` updates it weight by weight.
"""

import copy
from collections.abc import Iterator
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dwrl_fast.batching.balance import Cost
from dwrl_fast.batching.batch import Batch
from dwrl_fast.compute import Compute
from dwrl_fast.errors import ModelError
from dwrl_fast.models.adapters import base_fingerprint
from dwrl_fast.models.model import Model
from dwrl_fast.ranks import Ranks


class Sharded(Generic[Model]):
    """`model`, sharded in place over `ranks`. It is passed unsharded, in float32 or in the dtype of its file. Trained
    weights are cast to float32 layer by layer while they are sharded, so that no rank holds the whole model in float32
    unless it was passed in float32.

    replica: if thoughts are sampled, the whole model in the run's dtype. fingerprint: of the model as passed. Raises
    ModelError if the layers of the model are not found.
    """

    def __init__(self, model: Model, ranks: Ranks, compute: Compute, *, samples: bool, offload: bool = False):
        self.ranks, self.compute = ranks, compute
        self.fingerprint = base_fingerprint(model.lm)
        self.skeleton: Model = _copied(model, lambda p: p.data.to("meta"))
        self.replica: Model | None = model if samples else None
        self.model: Model = _copied(model, lambda p: p.data) if samples else model
        shard(self.model, ranks.mesh, compute, offload=offload)
        self.parts = dict(self.model.named_parameters())
        if self.replica is not None:
            narrow(self.replica, compute)
        self.offload, self.stale = offload, False

    def begin(self, batch: Batch) -> None:
        """Run `batch` without gradients. FSDP chooses its reduce dtype at the first pass, from the trained weights; but
        the first pass of a run may have its adapters switched off. All ranks call this together.
        """
        assert isinstance(self.model, FSDPModule)
        with torch.no_grad(), self.compute.autocast():
            self.model.idle(batch)
        self.model.reshard()

    def refresh(self) -> None:
        """Update the replica with the trained weights. All ranks call this together."""
        assert self.replica is not None
        if not self.stale:
            return
        whole = dict(self.replica.named_parameters())
        for name, full in self.gathered(trained=True):
            whole[name].data.copy_(full)
        self.stale = False

    def gathered(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The gathered weights (or only the trained ones) one by one, in their master dtype. All ranks take part."""
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()
        for name, part in self.parts.items():
            if part.requires_grad or not trained:
                assert isinstance(part, DTensor)
                yield name, part.full_tensor().detach()

    def whole(self) -> Model | None:
        """On the first rank a whole copy in CPU memory, gathered so that its GPU holds one weight at a time; None on
        the other ranks. All ranks call this together.
        """
        found = {}
        for name, full in self.gathered():
            if self.ranks.first:
                found[id(self.skeleton.get_parameter(name))] = full.cpu()
        return _copied(self.skeleton, lambda p: found[id(p)]).cpu() if self.ranks.first else None


def narrow(model: nn.Module, compute: Compute) -> None:
    """Cast the weights to the run's dtype. Buffers are not cast, because rotary frequencies are float32."""
    for p in model.parameters():
        p.data = p.data.to(compute.dtype)


def layers(lm: Any) -> list[nn.Module]:
    """The decoder layers of `lm`, in order. Raises ModelError if they are not found."""
    names = set(lm._no_split_modules or ())
    found = [module for module in lm.base_model.modules() if type(module).__name__ in names]
    if not found:
        raise ModelError(
            f"{type(lm).__name__} does not say which of its modules are layers (_no_split_modules), so it cannot be "
            "sharded: train it in one process, or take another model"
        )
    return found


def cost_of(model: Any) -> Cost:
    """The costs of the parts of a forward pass of `model`."""
    lm, config = model.lm, model.lm.config.get_text_config()
    head = lm.get_output_embeddings() or lm.score
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = layers(lm)
    return Cost(
        token=sum(p.numel() for layer in blocks for p in layer.parameters()),
        row=head.weight.numel(),
        pair=2 * len(blocks) * config.num_attention_heads * width,
    )


def shard(model: Any, mesh: Any, compute: Compute, *, offload: bool = False) -> None:
    """Shard `model` in place over `mesh`, unit by unit. It computes in the run's dtype, and gradients are summed over
    ranks in float32. A scalar head is in full precision. In a mesh of two dimensions, shards are along the second
    dimension and copies along the first.
    """
    heads = _float32_heads(model.lm)
    for unit in [*layers(model.lm), *heads, model]:
        for p in unit.parameters():
            if p.requires_grad and p.dtype.itemsize < 4:
                p.data = p.data.float()
        dtype = None if compute.float32 or unit in heads else compute.dtype
        precision = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
        )
        where = CPUOffloadPolicy() if offload else OffloadPolicy()
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=where, reshard_after_forward=None)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _float32_heads(lm: Any) -> list[nn.Module]:
    """The scalar head, if any: it computes in float32, whatever the dtype of the backbone."""
    return [lm.score] if lm.get_output_embeddings() is None else []


def _copied(model: Model, data: Any) -> Model:
    """A copy whose parameters are `data(parameter)`."""
    memo = {id(p): nn.Parameter(data(p), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)
