"""The identity of a run, and the check that a checkpoint belongs to it. The identity consists of the options and, by
content, of the rows, the template, the tokenizer and the start model.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwrl_fast.config import TrainConfig
from dwrl_fast.config.reporting import ReportingOptions
from dwrl_fast.errors import CheckpointError
from dwrl_fast.log import logger
from dwrl_fast.methods.method_options import VllmOptions
from dwrl_fast.options import option_fields

# Options that are not compared by value: paths and logging. Rows, dialog and model are compared by content, and the
# held-out rows with --eval_votes by the trainer, because they do not change what is trained.
APART = {
    *("explicit", "output_dir", "resume_from_checkpoint", "resume_anyway", "save_steps", "save_updates", "async_save"),
    *("save_total_limit", "skip_bad_batches", "eval_steps", "eval_votes", "eval_dataset_name", "dataset_name"),
    *("dataset_mixture", "columns", "layout", "max_length", "aspect", "template", "model_name_or_path"),
    *("model_config", "tokenizer_name_or_path", "num_train_epochs", "max_steps", "gradient_checkpointing"),
    *("ddp_timeout", "cpu_offload", "reshard_after_backward", "hsdp"),
    *(f.name for f in option_fields(ReportingOptions)),
}
# Options that may be changed during a run. The run continues with different results.
TUNABLE = {
    *("learning_rate", "score_learning_rate", "thought_learning_rate", "max_grad_norm", "dtype", "packing"),
    *("token_budget", "generation_batch_size", "generation_cache_gib", "old_logprobs", "max_minutes"),
    *(f.name for f in option_fields(VllmOptions)),
}
DEFAULTS = TrainConfig().to_dict()
# What is compared by content: its description, and what is lost if the run continues with a different one.
CONTENT = {
    "rows": (
        "the data set: its rows, or how they are chosen (--max_length, --columns, --aspect, the shares of a mixture)",
        "rows may be used twice or never",
    ),
    "dialog": ("the template", "earlier steps asked the model a different question"),
    "chat_template": ("the chat template of the tokenizer", "earlier steps saw different turns"),
    "tokenizer": ("the tokenizer", "a token id may mean a different text than in earlier steps"),
    "base": (
        "the base model (the weights that the run began with)",
        "adapters and a frozen reference no longer belong to the model that they were trained with",
    ),
    "steps": ("the number of steps", "the learning rate falls over a different number of steps"),
}


def identity(config: TrainConfig, rows: Any, steps: int, dialog: Any, base: str) -> dict[str, Any]:
    """The identity of a run as JSON. rows: `Feed.identity`. base: `models.adapters.base_fingerprint` at the start of
    the run.
    """
    options = {name: value for name, value in config.to_dict().items() if name not in APART}
    tokenizer = dialog.tokenizer
    return options | {
        "rows": rows,
        # Whether its aspect was named decides only which labels are read, which the rows show.
        "dialog": {name: value for name, value in dialog.to_dict().items() if name != "aspect_named"},
        "chat_template": _hash(tokenizer.get_chat_template()),
        "tokenizer": _hash(_rules(tokenizer)),
        "base": base,
        "steps": steps,
    }


def compare(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any], *, anyway: bool) -> None:
    """Compare the identity `theirs` of the checkpoint at `path` with `mine`, that of this run. Raises CheckpointError
    if the checkpoint belongs to a different run; with `anyway` this is only logged, with what is lost.
    """
    # A checkpoint of an older version lacks entries. Missing options are taken as their defaults, others not compared.
    theirs = {**DEFAULTS, **theirs}
    other = {k: _said(k, theirs[k], v) for k, v in mine.items() if k in theirs and theirs[k] != v}
    tuned = [text for name, text in other.items() if name in TUNABLE]
    strange = {name: text for name, text in other.items() if name not in TUNABLE}
    if tuned:
        logger.warning("The run continues with changed options: %s.", "; ".join(tuned))
    if not strange:
        return
    if not anyway:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(strange.values())}. Restore what "
            f"{path.parent / 'config.yaml'} names, start a new run in another --output_dir, or give --resume_anyway "
            "to continue as a different run."
        )
    given_up = [CONTENT[name][1] for name in strange if name in CONTENT]
    logger.warning(
        "--resume_anyway: this run continues from %s of a different run: %s. What is lost: the result no longer "
        "equals that of an uninterrupted run%s.",
        *(path, "; ".join(strange.values()), "".join(f"; {text}" for text in given_up)),
    )


def _said(name: str, was: Any, now: Any) -> str:
    if name not in CONTENT or name == "steps":
        return f"{CONTENT[name][0] if name in CONTENT else name} was {was!r}, is {now!r}"
    what, _ = CONTENT[name]
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return f"{what} is different"
    parts = [
        f"{k} was {was.get(k)!r}, is {now.get(k)!r}" for k in dict.fromkeys([*was, *now]) if was.get(k) != now.get(k)
    ]
    return f"{what} is different ({', '.join(parts)})"


def _rules(tokenizer: Any) -> str:
    """Everything that determines the ids of a text, without padding and truncation settings."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: rule for name, rule in rules.items() if name not in ("padding", "truncation")})


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
