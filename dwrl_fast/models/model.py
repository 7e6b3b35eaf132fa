"""The root modules: a Hugging Face backbone with its head.

One root owns backbone and head, so that checkpointing and saving handle a single module. Logits are never computed
here: the generative root returns the hidden states at thought rows and score rows together with the head's weight, and
`ops` computes the rest.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.errors import ModelError, NotFiniteError, UserError
from dwrl_fast.files import check_folder
from dwrl_fast.log import logger
from dwrl_fast.models import gguf
from dwrl_fast.models.adapters import (
    Lora,
    adapted,
    adapter_base,
    adapter_base_options,
    add_adapters,
    holds_head,
    is_adapter,
    merged_adapter,
    switched_off,
)
from dwrl_fast.models.backbone import (
    backbone_states,
    keep_rotary,
    keep_softcap,
    planned_states,
    refuse_past_rotary,
    rotary_limit,
)
from dwrl_fast.models.finite import listed, not_finite
from dwrl_fast.models.heads import HeadInputs
from dwrl_fast.models.trial import admit
from dwrl_fast.sampling.cache import CachedPlan

Model = TypeVar("Model", "GenerativeModel", "ScalarModel")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # of Gemma, RecurrentGemma, xLSTM
# The noise in training mode of routers, by their attributes: of Mixtral and MiniMax, PhiMoE, DBRX. Not the
# router_jitter_noise of PhiMoE, which also decides in evaluation mode which experts are used.
NOISES = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
SHORTEN = "shorten the texts (--max_length leaves longer ones out)"
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


class PreferenceModel(nn.Module):
    """What the two roots have in common. lm: the Hugging Face model. shares_cache: whether the trial showed that it
    samples correctly with a shared cache.
    """

    lm: Any
    shares_cache = False

    def __init__(self, lm: Any):
        super().__init__()
        switch_noise_off(lm)
        keep_softcap(lm)
        keep_rotary(lm)
        self.lm = lm

    def without_adapters(self) -> AbstractContextManager[None]:
        """A context in which the adapters are off, so that the model computes the same as before training. Do not
        compute gradients in it.

        Raises ModelError if the model has no adapters, because its weights before training are then lost.
        """
        return switched_off(self.lm)


class GenerativeModel(PreferenceModel):
    """A causal language model as a generative preference model (docs/method.md, 1).

    `lm` is a plain Hugging Face model and is saved and loaded as such. Raises ModelError for a model without an
    output head, or with a scale on its logits that the operators do not support.
    """

    def __init__(self, lm: Any):
        super().__init__(lm)
        if lm.get_output_embeddings() is None or lm.base_model is lm:
            raise ModelError(
                f"{type(lm).__name__} is not a causal language model with an output head; give a *ForCausalLM "
                "checkpoint"
            )
        config = lm.config.get_text_config()
        for name in LOGIT_SCALES:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ModelError(
                    f"{type(lm).__name__} multiplies its logits ({name} = {getattr(config, name)}), which the fused "
                    "head does not do; use a model without it (Llama, Qwen, Mistral, Gemma)"
                )
        caps = (getattr(config, name, None) for name in SOFTCAPS)
        self.softcap: float | None = next((cap for cap in caps if cap), None)

    def forward(self, batch: Batch, *, tokens: bool) -> HeadInputs:
        """The hidden states at the score rows, and with `tokens` at the thought rows too, with the head's weights."""
        hidden = backbone_states(self.lm.base_model, batch)
        return self.head(hidden[batch.score_rows], hidden[batch.token_rows if tokens else batch.token_rows[:0]])

    def idle(self, batch: Batch) -> Tensor:
        """A scalar 0 whose gradients are 0 for every weight: the loss of a rank without groups."""
        head = self(batch, tokens=True)
        return 0 * head.logprobs(head.token, batch.targets).sum()

    def states(self, ids: Tensor, positions: Tensor, plan: CachedPlan) -> Tensor:
        """[Q, H]: the last hidden states of new tokens [Q] at `positions` [Q] of their texts, over a cache."""
        return planned_states(self.lm.base_model, ids, positions, plan)

    def head(self, score: Tensor, token: Tensor) -> HeadInputs:
        """The head over hidden states [S, H] and [T, H]."""
        head = self.lm.get_output_embeddings()
        return HeadInputs(score=score, token=token, weight=head.weight, bias=head.bias, softcap=self.softcap)


class ScalarModel(PreferenceModel):
    """A sequence classifier with one output as a scalar reward model (method `bt`; docs/method.md, 3).

    Raises ModelError for a model without a `score` head.
    """

    def __init__(self, lm: Any):
        super().__init__(lm)
        if getattr(lm, "score", None) is None:
            raise ModelError(
                f"{type(lm).__name__} has no `score` head; bt needs a family with *ForSequenceClassification"
            )

    def forward(self, batch: Batch) -> Tensor:
        """The rewards [S] of the sequences, in float32, read at their last tokens."""
        hidden = backbone_states(self.lm.base_model, batch)[batch.score_rows]
        # A product in float32, whatever the dtype of the backbone, because bfloat16 rewards can be equal for different
        # responses. A sum over the single column, because FSDP does not accept a view as output of a module.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.lm.score(hidden.to(self.lm.score.weight.dtype)).sum(-1)

    def idle(self, batch: Batch) -> Tensor:
        """Like `GenerativeModel.idle`."""
        return 0 * self(batch).sum()


def load_generative(
    name_or_path: str | None,
    config_path: str | None,
    seed: int,
    lora: Lora | None = None,
    *,
    dtype: Literal["auto"] | None = None,
) -> GenerativeModel:
    """A causal language model from a folder, hub name or GGUF file, or with weights drawn with `seed` for the config at
    `config_path`. The weights are float32 masters; with dtype "auto" they have the dtype of the file. With `lora` the
    model is frozen and has adapters. A folder of adapters is loaded as the merged model.

    Raises ModelError if it does not load, and ConfigError for options of `lora` that do not fit.
    """
    from transformers import AutoModelForCausalLM

    return GenerativeModel(_load(AutoModelForCausalLM, name_or_path, config_path, seed, lora, dtype))


def load_scalar(
    name_or_path: str | None,
    config_path: str | None,
    seed: int,
    pad_id: int,
    lora: Lora | None = None,
    *,
    new_head: bool = False,
    dtype: Literal["auto"] | None = None,
) -> ScalarModel:
    """Like `load_generative`, with a scalar head on the same backbone. new_head: whether a head that the checkpoint
    lacks is initialised with `seed`, because it will be trained. pad_id: the padding token.
    """
    from transformers import AutoModelForSequenceClassification

    model = _load(
        AutoModelForSequenceClassification,
        name_or_path,
        config_path,
        seed,
        lora,
        dtype,
        new_head=new_head,
        num_labels=1,
    )
    model.config.pad_token_id = pad_id
    return ScalarModel(model)


def _load(
    auto: Any,
    name_or_path: str | None,
    config_path: str | None,
    seed: int,
    lora: Lora | None,
    dtype: Literal["auto"] | None,
    *,
    new_head: bool = False,
    **extra: Any,
) -> Any:
    from transformers import AutoConfig

    quiet()
    if name_or_path is not None and is_adapter(name_or_path):
        return _load_merged(auto, name_or_path, seed, lora, **extra)
    source = str(name_or_path or config_path)
    # The caller's random state must not depend on whether a model was initialised.
    with torch.random.fork_rng(devices=[]), gguf.source(source) as (path, keywords):
        torch.manual_seed(seed)
        try:
            check_folder(path)
            if name_or_path is not None:
                options = {"dtype": dtype or torch.float32} | extra | ({} if lora is None else lora.base_options())
                options = gguf.dequantising(options, source) if keywords else options | {"use_safetensors": True}
                # The report lists missing weights and weights of different sizes.
                options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
                with _without_remarks():
                    model, report = auto.from_pretrained(path, trust_remote_code=False, **options, **keywords)
            else:
                config = AutoConfig.from_pretrained(path, trust_remote_code=False, **keywords, **extra)
                model, report = auto.from_config(config, dtype=torch.float32, trust_remote_code=False), None
        except UserError:
            raise
        except Exception as error:  # the libraries below raise anything where a file is damaged
            hint = (
                gguf.NEEDS
                if keywords
                else "The folder exists but does not load: it needs config.json and model.safetensors, each whole. "
                "Copy it again."
                if Path(source).exists()
                else "There is no such file."
                if source.endswith(".json")
                else "Give a local folder, or a hub name while the hub can be reached."
            )
            raise ModelError(
                f"cannot load a model from {source!r}. {hint}\n  {type(error).__name__}: {error}"
            ) from error
        if report is not None:
            _refuse_other_weights(source, model, report, new_head)
            _read_tying(model)
            if keywords:
                gguf.say_dequantised(model, source)
        if adapted(model):
            raise ModelError(f"{source} is an adapter of the hub: give a local folder of it, or the merged model")
        if lora is not None:
            add_adapters(model, lora, source)
    return model


@contextmanager
def _without_remarks() -> Iterator[None]:
    """A context without warnings of transformers about weights that are missing, drawn or not tied: this module raises
    an error for them, or repairs them.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_other_weights(source: str, model: Any, report: dict[str, Any], new_head: bool) -> None:
    """Raise ModelError if the file lacks weights of `model` (they would be random), or holds others. A new scalar head
    that will be trained may replace the head of a language model.
    """
    missing, others = set(report["missing_keys"]), set(report["unexpected_keys"])
    if new_head and "score.weight" in missing:
        missing = {name for name in missing if not name.startswith("score.")}
        others = {name for name in others if not name.startswith("lm_head.")}
    sizes = {f"{name} as {list(there)} for {list(here)}" for name, there, here in report["mismatched_keys"]}
    said = {"lacks": missing, "also holds": others, "has": sizes}
    found = [f"{what} {listed(names)}" for what, names in said.items() if names]
    if found:
        raise ModelError(
            f"the weights in {source} are not those of {type(model).__name__}: the file {' and '.join(found)}. Copy "
            "the model again from where it was made, or give the config.json that belongs to it"
        )


def _read_tying(model: Any) -> None:
    """Set the config's tie_word_embeddings to what the weights show, because saving and merging use the config. Merged
    checkpoints can have a separate head with a config that says tied.
    """
    head = model.get_output_embeddings()
    if head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = tied


def _load_merged(auto: Any, folder: str, seed: int, lora: Lora | None, **extra: Any) -> Any:
    if lora is not None:
        raise ModelError(
            f"{folder} is an adapter, and --use_peft trains a new one over a whole model: give the merged model "
            "(OUTPUT_DIR/model, next to OUTPUT_DIR/adapter)"
        )
    name, options = adapter_base(folder), adapter_base_options(folder)
    try:
        base = _load(auto, name, None, seed, None, None, new_head=holds_head(folder), **extra, **options)
    except ModelError as error:
        raise ModelError(
            f"{folder} holds adapters of {name}, which is also needed: put it back, or write its new place into "
            f"adapter_config.json as base_model_name_or_path. {error}"
        ) from error
    return merged_adapter(base, folder)


def place(model: Model, compute: Compute, layout: Layout, *, thinks: bool = True, trains: bool = True) -> Model:
    """Move `model` to the device and try it there on batches of `layout`; if it `thinks`, in sampling; and if it
    `trains`, in training mode.

    Returns the model. Raises ModelError if it cannot run them, and NotFiniteError, which names the weights with NaN, if
    there are any.
    """
    model.to(compute.device)
    thinks = thinks and isinstance(model, GenerativeModel)
    try:
        model.shares_cache = admit(model, layout.packing, layout.pad_id, compute, thinks=thinks, trains=trains)
    except NotFiniteError as error:
        if wrong := not_finite(model.lm):
            raise NotFiniteError(
                f"{type(model.lm).__name__} cannot be used: its weights hold NaN or infinities, in {listed(wrong)}. "
                "Use an earlier checkpoint, or copy the model again"
            ) from error
        raise
    return model


def switch_noise_off(model: nn.Module) -> None:
    """Set every dropout rate and the noise of routers to 0: with them the log-probabilities of a thought would differ
    from those at sampling, and the ratios of the policy loss would be wrong.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            # Dropout is also in attributes such as attention_dropout, layerdrop and attn_pdrop.
            if isinstance(value, float) and ("drop" in name or name in NOISES):
                setattr(module, name, 0.0)


def cast_once(model: PreferenceModel, compute: Compute) -> None:
    """Cast the linear layers of a model that is never trained to the run's dtype. Autocast would give the same, but it
    casts weights without gradients again at every pass. The head is not cast.
    """
    for module in model.lm.base_model.modules() if not compute.float32 else ():
        if isinstance(module, nn.Linear):
            module.to(compute.dtype)


def check_vocabulary(model: "GenerativeModel | ScalarModel", largest_id: int) -> None:
    """Raise ModelError unless the model embeds every token id up to `largest_id`, the largest that the dialog can
    produce.
    """
    rows = model.lm.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ModelError(
            f"the tokenizer makes ids up to {largest_id} but the model embeds only {rows}: they do not belong "
            "together. Set --tokenizer_name_or_path to the model's own tokenizer, or vocab_size in --model_config to "
            f"at least {largest_id + 1}."
        )


def positions(model: "GenerativeModel | ScalarModel") -> int | None:
    """The maximum tokens of a sequence; None if the config does not say."""
    said = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None)
    return min((most for most in (said, rotary_limit(model.lm)) if most is not None), default=None)


def check_positions(
    model: "GenerativeModel | ScalarModel", longest: int, remedy: str = "lower --max_length or --max_completion_length"
) -> bool:
    """Warn if a sequence of `longest` tokens has more tokens than the model has positions. Returns whether it has.

    remedy: the advice in the warning. Raises ModelError like `refuse_past_positions`.
    """
    refuse_past_positions(model, longest, remedy)
    most = positions(model)
    if most is None or longest <= most:
        return False
    logger.warning("%s: %s.", _reach(longest, most), remedy)
    return True


def refuse_past_positions(model: "GenerativeModel | ScalarModel", longest: int, remedy: str) -> None:
    """Raise ModelError if the model cannot compute a sequence of `longest` tokens: past `rotary_limit`, where scores
    would depend on the batch, or past an embedding of positions (GPT-2, OPT), which has no further rows.
    """
    refuse_past_rotary(model.lm, longest)
    most = positions(model)
    if most is not None and longest > most and _embeds_positions(model.lm, most):
        raise ModelError(f"{_reach(longest, most)}, each with its own weights: {remedy}.")


def _reach(longest: int, most: int) -> str:
    return f"Sequences may reach {longest} tokens, but the model has positions for {most}"


def _embeds_positions(lm: Any, most: int) -> bool:
    """Whether a row of an embedding belongs to each of `most` positions. Some models have a few rows more."""
    embeddings = (module for module in lm.base_model.modules() if isinstance(module, nn.Embedding))
    own = lm.get_input_embeddings()
    return any(each is not own and most <= each.num_embeddings < most + 8 for each in embeddings)


def quiet() -> None:
    """Switch off the progress bars of transformers: loading and saving are short, and their bars would break ours. Also
    a warning of bitsandbytes, which peft imports, about kernels that it would download from the hub.
    """
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
