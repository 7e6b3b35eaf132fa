"""The root modules: a Hugging Face backbone and its head, seen as hidden states at the rows that matter.

One root owns backbone and head, so that sharding, checkpointing and saving see one module. Logits are never built here:
the generative root returns the hidden states at the thought and score rows with the head's weight, and the operators do
the rest.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dwrl_fast import gguf
from dwrl_fast.adapters import Lora, adapted, adapter_base, add_adapters, is_adapter, merged_adapter, switched_off
from dwrl_fast.backbone import attend_over_trees, backbone_states, keep_softcap
from dwrl_fast.batch import Batch
from dwrl_fast.compute import Compute
from dwrl_fast.errors import ModelError
from dwrl_fast.layout import Layout
from dwrl_fast.log import logger

Model = TypeVar("Model", "GenerativeModel", "ScalarModel")
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What the head's operators take.

    score [S, H], token [T, H] (or [0, H] where they were not asked for), weight [V, H], bias [V], softcap.
    """

    score: Tensor
    token: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None


class PreferenceModel(nn.Module):
    """What the two roots have in common."""

    lm: Any

    def __init__(self, lm: Any):
        super().__init__()
        keep_softcap(lm)
        self.lm = lm

    def reference(self) -> AbstractContextManager[None]:
        """Within it the model is what it was before training, its adapters switched off; no gradient is to be taken.

        Raises ModelError where it has none, for then nothing of it is left as it was.
        """
        return switched_off(self.lm)


class GenerativeModel(PreferenceModel):
    """A causal language model as a generative preference model. `lm` stays a plain Hugging Face model: save and load it
    as such.
    """

    def __init__(self, lm: Any):
        super().__init__(lm)
        if lm.get_output_embeddings() is None or lm.base_model is lm:
            raise ModelError(
                f"{type(lm).__name__} is no causal language model with an output head; give a *ForCausalLM checkpoint"
            )
        config = lm.config.get_text_config()
        for name in LOGIT_SCALES:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ModelError(
                    f"{type(lm).__name__} multiplies its logits ({name} = {getattr(config, name)}), which the fused "
                    "head does not do; use a model without it (Llama, Qwen, Mistral, Gemma)"
                )
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, batch: Batch, *, tokens: bool) -> HeadInputs:
        """Hidden states at the score rows, and with `tokens` at the thought rows."""
        hidden = backbone_states(self.lm.base_model, batch)
        head = self.lm.get_output_embeddings()
        return HeadInputs(
            score=hidden[batch.score_rows],
            token=hidden[batch.token_rows if tokens else batch.token_rows[:0]],
            weight=head.weight,
            bias=head.bias,
            softcap=self.softcap,
        )


class ScalarModel(PreferenceModel):
    """A sequence classifier with one output as a scalar reward model (method `bt`)."""

    def __init__(self, lm: Any):
        super().__init__(lm)
        if getattr(lm, "score", None) is None:
            raise ModelError(
                f"{type(lm).__name__} has no `score` head; bt needs a family with *ForSequenceClassification"
            )

    def forward(self, batch: Batch) -> Tensor:
        """Rewards [S] in float32, read at the last token."""
        hidden = backbone_states(self.lm.base_model, batch)[batch.score_rows]
        # One product in float32 whatever the trunk computes in: bfloat16 rewards tie where the responses do not.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.lm.score(hidden.float()).squeeze(-1)


def load_generative(
    name_or_path: str | None, config_path: str | None, seed: int, lora: Lora | None = None
) -> GenerativeModel:
    """A causal LM from a folder, hub name or GGUF file, or drawn from `config_path` with `seed`; float32 master
    weights, or `lora`'s over a frozen model. A folder of adapters loads as the model that they merge into.
    """
    from transformers import AutoModelForCausalLM

    return GenerativeModel(_load(AutoModelForCausalLM, name_or_path, config_path, seed, lora))


def load_scalar(
    name_or_path: str | None, config_path: str | None, seed: int, pad_id: int, lora: Lora | None = None
) -> ScalarModel:
    """The same backbone under a one-output head, drawn with `seed` where the checkpoint has none."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()  # a language model has no such head, and to be warned of that helps nobody
    model = _load(AutoModelForSequenceClassification, name_or_path, config_path, seed, lora, num_labels=1)
    logging.set_verbosity(said)
    model.config.pad_token_id = pad_id
    return ScalarModel(model)


def _load(
    auto: Any, name_or_path: str | None, config_path: str | None, seed: int, lora: Lora | None, **extra: Any
) -> Any:
    from transformers import AutoConfig

    quiet()
    if name_or_path is not None and is_adapter(name_or_path):
        return _load_merged(auto, name_or_path, seed, lora, **extra)
    source = str(name_or_path or config_path)
    options = extra | ({"dtype": torch.float32} if lora is None else lora.base_options())
    if gguf.is_gguf(name_or_path):
        options = gguf.dequantising(options, source)
    # The caller's stream of random numbers must not depend on whether a model was drawn.
    with torch.random.fork_rng(devices=[]), gguf.source(source) as (path, keywords):
        torch.manual_seed(seed)
        try:
            if name_or_path is not None:
                model = auto.from_pretrained(path, trust_remote_code=False, **keywords, **options)
            else:
                config = AutoConfig.from_pretrained(path, trust_remote_code=False, **keywords, **extra)
                model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except (OSError, ValueError, KeyError, AssertionError, RuntimeError) as error:
            hint = (
                gguf.NEEDS
                if keywords
                else "The folder exists but does not load: it needs config.json and model.safetensors."
                if Path(source).exists()
                else "Give a local folder, or a hub name while the hub can be reached."
            )
            raise ModelError(f"cannot load a model from {source!r}. {hint}\n  {error}") from error
        if gguf.is_gguf(name_or_path):
            gguf.say_dequantised(model, source)
        if adapted(model):
            raise ModelError(
                f"{source} is an adapter of the hub: give a local folder of it, or the model that it merges into"
            )
        if lora is not None:
            add_adapters(model, lora, str(name_or_path))
    switch_dropout_off(model)
    return model


def _load_merged(auto: Any, folder: str, seed: int, lora: Lora | None, **extra: Any) -> Any:
    if lora is not None:
        raise ModelError(
            f"{folder} is an adapter, and --use_peft trains a new one over a whole model: give the one that it merges "
            "into (OUTPUT_DIR/model beside OUTPUT_DIR/adapter)"
        )
    return merged_adapter(_load(auto, adapter_base(folder), None, seed, None, **extra), folder)


def place(model: Model, compute: Compute, layout: Layout) -> Model:
    """`model` on the device, able to run the batches of `layout`; ModelError where it is not."""
    model.to(compute.device)
    if layout.packing != "padded":
        attend_over_trees(model.lm, compute.autocast)
    return model


def switch_dropout_off(model: nn.Module) -> None:
    """Under dropout the log-probs of a thought would not be those it was sampled with, and no ratio would be right."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - an attribute of Hugging Face's, not of nn.Module


def check_vocabulary(model: "GenerativeModel | ScalarModel", largest_id: int) -> None:
    """Every id that the dialog can make must have an embedding."""
    rows = model.lm.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ModelError(
            f"the tokenizer makes ids up to {largest_id} but the model embeds only {rows}: they do not belong "
            "together. Set --tokenizer_name_or_path to the model's own tokenizer, or vocab_size in --model_config to "
            f"at least {largest_id + 1}."
        )


def check_positions(model: "GenerativeModel | ScalarModel", longest: int) -> None:
    """Say so where a sequence may be longer than what the model has positions for."""
    positions = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        logger.warning(
            "Sequences may reach %d tokens, and the model was made for %d: lower --max_length or "
            "--max_completion_length.",
            longest,
            positions,
        )


def quiet() -> None:
    """Loading and saving are a moment's work beside ours: no bars of their own between our bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
