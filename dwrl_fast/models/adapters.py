"""LoRA with peft: low-rank adapters inside a frozen model; only the adapters are trained (docs/methods.md, Adapters).

The adapters are inside the model's own linear layers, so the model keeps its Hugging Face class, and its attention,
head and sampling are used as before. Adapters are float32, like everything that the optimizer changes.
"""

import copy
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwrl_fast.compute import Compute
from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.files import bounded_json, check_folder
from dwrl_fast.log import logger

NAME = "default"  # name of the model's only adapter; peft's default
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUANTIZATION = "quantization_config.json"  # how the base was quantised, as transformers writes it
# How a base is quantised: all that its values depend on.
FOUR_BIT = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_skip_modules": None,
}
PREFIX = "base_model.model."  # prefix of every name in peft's files
# In a model with several experts in one tensor, peft interprets these names as parts of that tensor, which this package
# cannot merge.
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"}


@dataclass(frozen=True, slots=True)
class Lora:
    """The settings of adapters (LoRA, arXiv 2106.09685).

    rank, alpha: the adapters' product is scaled by alpha / rank. targets: names of linear layers; empty: all except the
    head. four_bit: whether the frozen model is quantised to NF4. Raises ConfigError if a package is missing.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    four_bit: bool
    compute: Compute

    def __post_init__(self) -> None:
        _need_peft()
        if self.four_bit:
            _need_bitsandbytes("--load_in_4bit")

    def base_options(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` for the frozen model."""
        return {"dtype": _base_dtype(self.compute)} | (_four_bit(self.compute) if self.four_bit else {})


def add_adapters(lm: Any, lora: Lora, base: str) -> None:
    """Freeze `lm`, which was loaded from `base`, and add adapters that change nothing yet (B is 0). A scalar head is
    also trained, in full.

    Raises ConfigError if the targets are not linear layers of `lm`, or include its head or embedding.
    """
    from peft import LoraConfig, inject_adapter_in_model

    scalar = lm.get_output_embeddings() is None
    linear = _targets(lm, lm.score if scalar else lm.get_output_embeddings())
    fused = sorted({name.rpartition(".")[2] for name, p in lm.named_parameters() if _fused(lm, name, p)})
    default = lora.targets in ((), ("all-linear",))
    targets = (linear - FEED_FORWARD if fused else linear) if default else set(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=sorted(targets),
        modules_to_save=["score"] if scalar else None,
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).exists() else base,
    )
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of bitsandbytes: its bfloat16 copies, for inference alone,
            module.support_avx512bf16_for_cpu = False  # would give a thought other log-probs than training does
    if stray := sorted(name for name in targets if name not in linear and name.rpartition(".")[2] not in linear):
        raise ConfigError(
            f"--lora_target_modules {' '.join(stray)}: {type(lm).__name__} can have adapters only in its linear "
            f"layers below the head (the fused operators read the head's weight directly): {', '.join(sorted(linear))}"
        )
    try:
        inject_adapter_in_model(config, lm, NAME)
    except ValueError as error:
        raise ConfigError(f"--lora_target_modules: peft refuses {type(lm).__name__}: {error}") from error
    if not _mergeable(lm, config):
        raise ConfigError(
            f"--lora_target_modules {' '.join(sorted(targets))}: some of these are experts in one tensor of "
            f"{type(lm).__name__}, which cannot be merged for the saved model. Choose from "
            f"{', '.join(sorted(linear - FEED_FORWARD))}"
        )
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    logger.info("LoRA of rank %d in %d layers: %s trained parameters", lora.rank, len(_layers(lm)), f"{trained:,}")
    if fused:
        logger.warning(
            "LoRA cannot adapt %s (several experts in one tensor) or the feed-forward layers next to them: they stay "
            "frozen.",
            ", ".join(fused),
        )


def _targets(lm: Any, head: nn.Module) -> set[str]:
    """The layers that can have adapters: the last part of their names, or the full name if the last part also names
    something else (such as the "0" of a list).
    """
    found = {name: module for name, module in lm.named_modules() if _linear(module) and module is not head}
    others = {name.rpartition(".")[2] for name, module in lm.named_modules() if name not in found}
    return {name if name.rpartition(".")[2] in others else name.rpartition(".")[2] for name in found}


def _linear(module: nn.Module) -> bool:
    """Whether adapters can be added to this layer and merged into it. Several experts in one tensor cannot."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _fused(lm: Any, name: str, parameter: nn.Parameter) -> bool:
    """Whether one parameter holds several matrices, as in mixture-of-experts layers."""
    return parameter.ndim == 3 and not isinstance(lm.get_submodule(name.rpartition(".")[0]), nn.Conv1d)


def adapted(lm: Any) -> bool:
    """Whether `lm` has adapters."""
    return hasattr(lm, "peft_config")


@contextmanager
def switched_off(lm: Any) -> Iterator[None]:
    """A context in which the adapters of `lm` are off, so that it computes the same as before training.

    The adapters get no gradient there. Raises ModelError if `lm` has no adapters.
    """
    if not adapted(lm):
        raise ModelError(f"{type(lm).__name__} has no adapters to switch off; add --use_peft")
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    switches = [module for module in lm.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for switch in switches:
        switch.enable_adapters(False)
    try:
        yield
    finally:
        for switch in switches:
            switch.enable_adapters(True)


def is_adapter(name_or_path: str) -> bool:
    """Whether this is a local folder of adapters."""
    return (Path(name_or_path) / CONFIG).is_file()


def adapter_base(folder: str) -> str:
    """The name or path of the model that the adapters in `folder` belong to. Raises ModelError if the folder does not
    name it.
    """
    base = _config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder}/{CONFIG} does not say which model its adapters belong to (base_model_name_or_path)")
    return base


def holds_head(folder: str) -> bool:
    """Whether `folder` also holds a scalar head."""
    return "score" in (_config(folder).get("modules_to_save") or ())


def _config(folder: str, name: str = CONFIG) -> dict[str, Any]:
    try:
        check_folder(folder)
        return dict(bounded_json(Path(folder) / name))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} cannot be read as a folder of adapters: {name}: {error}. Copy it again") from None


def adapter_base_options(folder: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` for the model that the adapters in `folder` belong to: in 4 bits if they were
    trained so, because the rounding of the base is part of what they were fitted to.

    Raises ModelError if that base was quantised in another way.
    """
    if not (Path(folder) / QUANTIZATION).is_file():
        return {}
    said = _config(folder, QUANTIZATION)
    if others := [name for name, value in FOUR_BIT.items() if said.get(name) != value]:
        raise ModelError(
            f"{folder}/{QUANTIZATION}: the adapters were fitted to a base with "
            f"{', '.join(f'{name} = {said.get(name)}' for name in others)}; it can be loaded only with "
            f"{', '.join(f'{name} = {FOUR_BIT[name]}' for name in others)}. Merge them with the tool that trained "
            "them, and give the merged model"
        )
    _need_bitsandbytes(f"{folder} was trained on its base in 4 bits. Give the merged model next to it, or install it")
    return _four_bit(Compute.resolve("auto"))


def _four_bit(compute: Compute) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_compute_dtype=_base_dtype(compute))
    return {"quantization_config": quantized, "device_map": {"": compute.device}}


def _base_dtype(compute: Compute) -> torch.dtype:
    """The dtype of the frozen model: that of the run, on a CPU float32. There bfloat16 would save no time, and the
    model would differ from the start of full training.
    """
    return torch.float32 if compute.device.type == "cpu" else compute.dtype


def merged_adapter(lm: Any, folder: str) -> Any:
    """The model that results from merging the adapters in `folder` into `lm`, their base in float32.

    Raises ModelError if they are not plain LoRA, or do not fit `lm`.
    """
    _need_peft()
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(folder)
        tensors = {name.removeprefix(PREFIX): t for name, t in load_file(Path(folder) / WEIGHTS).items()}
        inject_adapter_in_model(config, lm, NAME)
        fit = set_peft_model_state_dict(lm, tensors, NAME)
    except Exception as error:  # the libraries raise many kinds of errors for a damaged file
        raise ModelError(
            f"{folder} cannot be merged into its base: {error}. Copy it again, or give the merged model"
        ) from error
    strange = [*fit.unexpected_keys, *(name for name in fit.missing_keys if f".{NAME}" in name)]
    if strange:
        raise ModelError(f"{folder} does not fit its base and cannot be merged into it: {', '.join(strange[:3])}")
    if not isinstance(config, LoraConfig) or not _mergeable(lm, config):
        raise ModelError(
            f"{folder} holds more than plain LoRA in linear layers below the head (biases, DoRA, embeddings or "
            "similar), which this package does not merge; merge it with peft's merge_and_unload"
        )
    return plain(lm)


def _mergeable(lm: Any, config: Any) -> bool:
    layers = _layers(lm).values()
    plainly = all(_linear(layer.base_layer) and not layer.lora_variant for layer in layers)
    head = lm.get_output_embeddings()
    ends = {"score", "classifier"} if head is None else set()
    return plainly and config.bias == "none" and head not in layers and set(config.modules_to_save or ()) <= ends


def plain(lm: Any) -> Any:
    """`lm` itself if it has no adapters; otherwise a new model without adapters that computes the same, merged in
    float32 on the CPU. `lm` is not changed, because adding adapters to weights and subtracting them again does not
    restore the weights exactly.
    """
    if not adapted(lm):
        return lm
    with torch.device("meta"):
        model = type(lm)(plain_config(lm))
    weights = {name: weight.cpu() for name, weight in merged(lm, dequantized(lm))}
    found = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for name, buffer in lm.named_buffers():  # of rotary embeddings, which files do not contain
        owner, _, kind = name.rpartition(".")
        setattr(model.get_submodule(owner), kind, buffer.cpu())
    assert not found.unexpected_keys and not any(p.is_meta for p in model.parameters()), found
    if lm.can_generate():
        model.generation_config = lm.generation_config
    return model


def plain_config(lm: Any) -> Any:
    """The configuration of `plain(lm)`, without the quantisation of a model in 4 bits."""
    config = copy.deepcopy(lm.config)
    config.__dict__.pop("quantization_config", None)
    return config


def dequantized(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `lm` by name; 4-bit weights are dequantised to matrices."""
    for name, parameter in lm.named_parameters():
        owner, _, kind = name.rpartition(".")
        if adapted(lm) and kind == "weight":
            from peft.utils.integrations import dequantize_module_weight

            parameter = dequantize_module_weight(lm.get_submodule(owner))
        yield name, parameter.detach()


def merged(lm: Any, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The effective weights of a model with the parameters `named` (in the order of those of `lm`), under their names
    without adapters, merged in float32. Without adapters the parameters are passed through.
    """
    if not adapted(lm):
        yield from named
        return
    layers, base, down = _layers(lm), {}, {}
    for name, weight in named:
        if ".original_module." in name:
            continue
        owner, _, kind = name.rpartition(".")
        layer, part = owner.removesuffix(".base_layer"), owner.rpartition(".lora_")
        if layer in layers and layer != owner and kind == "weight":
            base[layer] = weight.float()  # kept until its adapters arrive, which follow it
        elif part[1] and part[2].startswith("A."):
            down[part[0]] = weight
        elif part[1]:
            delta = weight @ down.pop(part[0])
            turned = delta.T if layers[part[0]].fan_in_fan_out else delta
            yield f"{part[0]}.weight", base.pop(part[0]) + turned * layers[part[0]].scaling[NAME]
        else:
            plainly = name.replace(".base_layer.", ".").replace(f".modules_to_save.{NAME}.", ".")
            yield plainly, weight.float()


def _layers(lm: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}


def write_adapter(folder: Path, lm: Any) -> None:
    """Write the adapters of `lm` in peft's format. PeftModel.from_pretrained loads them onto their base, which a run in
    4 bits describes in QUANTIZATION.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    found = get_peft_model_state_dict(lm, adapter_name=NAME, save_embedding_layers=False)
    folder.mkdir(parents=True)
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    lm.peft_config[NAME].save_pretrained(folder)
    if getattr(lm, "is_loaded_in_4bit", False):  # a dequantised GGUF file also has a quantization_config
        lm.config.quantization_config.to_json_file(folder / QUANTIZATION)


def base_fingerprint(lm: Any) -> str:
    """A hash that identifies the model at the start of a run, independent of its location. It covers about 64 elements
    of every weight, except adapters and other trained weights. The elements are hashed as bfloat16, so that the dtype
    of the file does not matter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in lm.named_parameters():
        if not (adapted(lm) and parameter.requires_grad):
            flat = parameter.detach().flatten()
            some = flat[:: max(1, flat.numel() // 64)].bfloat16()
            digest.update(name.encode() + some.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _need_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--use_peft: peft is not installed (pip install peft)")


def _need_bitsandbytes(why: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{why}: bitsandbytes is not installed (pip install bitsandbytes)")
