"""The planned run: options, method, device, and the sizes of the model's parts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dwrl_fast.compute import DTYPES, Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.methods import METHODS, Method
from dwrl_fast.models.adapters import Lora
from dwrl_fast.models.backbone import attend_over_trees
from dwrl_fast.models.model import load_generative, load_scalar
from dwrl_fast.models.sharding import layers
from dwrl_fast.plan.lengths import Lengths
from dwrl_fast.plan.profile import Profile

NF4 = 0.5 + 4 / 64  # bytes of a 4-bit weight, with a float32 scale per 64 weights


class Weights(NamedTuple):
    """The numbers of trained and of frozen weights."""

    trained: int = 0
    frozen: int = 0

    @property
    def all(self) -> int:
        """The sum of both."""
        return self.trained + self.frozen


class Shape(NamedTuple):
    """A model's sizes. depth: number of layers. layer: weights of the largest layer; stack: of all layers. root:
    weights of embedding, norm and head. head: [V, H], empty for a scalar head; tied: whether it is the embedding.
    inner: the widest state in a layer. channels: of all query heads. cached: numbers of keys and values per token in
    all layers.
    """

    name: str
    depth: int
    layer: Weights
    stack: Weights
    root: Weights
    head: tuple[int, ...]
    tied: bool
    width: int
    inner: int
    channels: int
    cached: int

    @property
    def parameters(self) -> int:
        """The parameters of the whole model, including adapters."""
        return self.stack.all + self.root.all


@dataclass(frozen=True, slots=True)
class Setup:
    """The planned run. dtype: of its passes. The method has no dialog; only its traits are used."""

    config: TrainConfig
    method: Method
    lengths: Lengths
    profile: Profile
    dtype: torch.dtype
    shape: Shape

    @property
    def capacity(self) -> float:
        """GiB of one device: --gpu_memory, which only a plan has, or else the memory of the profile."""
        return getattr(self.config, "gpu_memory", None) or self.profile.memory_gib

    @property
    def states(self) -> int:
        """The number of AdamW states over the trained weights."""
        return len(self.method.phases) if self.method.separate_states else 1

    @property
    def writes(self) -> bool:
        """Whether the trained model samples its own thoughts with this package's sampler."""
        own = self.method.thinks and self.method.writer is None
        return own and not self.config.use_vllm


def planned(config: TrainConfig, lengths: Lengths, profile: Profile) -> Setup:
    """The run of `config`. Raises ModelError if the model's configuration cannot be read, or if it cannot run on a
    tree.
    """
    made = METHODS[config.method]
    method = made.__new__(made)  # the traits depend only on options; a dialog would need a tokenizer
    method.config = config
    dtype = DTYPES.get(config.dtype, profile.dtype)
    with FakeTensorMode():
        shape = _shape(built(config, dtype))
    return Setup(config, method, lengths, profile, dtype, shape)


def built(config: TrainConfig, dtype: torch.dtype) -> Any:
    """The root module of the run, from its configuration alone, with fake weights. Call it under FakeTensorMode. The
    module is first created without weights, because peft moves adapters in a way that fake tensors do not support.
    """
    name = str(config.model_config or config.model_name_or_path)
    lora = None
    if config.use_peft:
        compute = Compute(torch.device("cpu"), dtype)
        lora = Lora(config.lora_r, config.lora_alpha, config.lora_target_modules, False, compute)
    with unset_fake_temporarily(), torch.device("meta"):
        if METHODS[config.method].scalar:
            model: Any = load_scalar(None, name, config.seed, 0, lora)
        else:
            model = load_generative(None, name, config.seed, lora)
    attend_over_trees(model.lm)
    _fill(model)
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)  # a base model with adapters loads in the run's dtype
    if config.gradient_checkpointing:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _fill(model: nn.Module) -> None:
    """Give every weight and buffer storage on the CPU; shared tensors stay shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                held[name] = made[id(old)]


def _shape(model: Any) -> Shape:
    config, blocks = model.lm.config.get_text_config(), layers(model.lm)
    inside = {id(p) for block in blocks for p in block.parameters()}
    head = model.lm.get_output_embeddings()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Shape(
        name=type(model.lm).__name__,
        depth=len(blocks),
        layer=max((_weights(block.parameters()) for block in blocks), key=lambda weights: weights.all),
        stack=_weights(p for block in blocks for p in block.parameters()),
        root=_weights(p for p in model.parameters() if id(p) not in inside),
        head=() if head is None else tuple(head.weight.shape),
        tied=head is not None and head.weight is model.lm.get_input_embeddings().weight,
        width=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        channels=config.num_attention_heads * width,
        cached=2 * len(blocks) * keys * width,
    )


def _weights(parameters: Iterable[nn.Parameter]) -> Weights:
    found = list(parameters)
    trained = sum(p.numel() for p in found if p.requires_grad)
    return Weights(trained, sum(p.numel() for p in found) - trained)
