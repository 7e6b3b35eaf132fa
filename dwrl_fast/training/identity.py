"""What makes a run this run, and whether a checkpoint belongs to it: its options, and by their content its rows, its
template, its tokenizer and the model that it began with.
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

# Options that say where a run reads and writes; its rows, its dialog and its model are compared by content.
APART = {
    *("explicit", "output_dir", "resume_from_checkpoint", "resume_anyway", "save_steps", "save_updates", "async_save"),
    *("save_total_limit", "skip_bad_batches", "eval_steps", "eval_votes", "eval_dataset_name", "dataset_name"),
    *("dataset_mixture", "columns", "layout", "max_length", "aspect", "template", "model_name_or_path"),
    *("model_config", "tokenizer_name_or_path", "num_train_epochs", "max_steps", "gradient_checkpointing"),
    *("ddp_timeout", "cpu_offload", "reshard_after_backward", "hsdp"),
    *(f.name for f in option_fields(ReportingOptions)),
}
# Options that may be mended on the way: the run goes on, to other figures.
TUNABLE = {
    *("learning_rate", "score_learning_rate", "thought_learning_rate", "max_grad_norm", "dtype", "packing"),
    *("token_budget", "generation_batch_size", "generation_cache_gib", "old_logprobs", "max_minutes"),
    *(f.name for f in option_fields(VllmOptions)),
}
# What is compared by content: what it is called, and what a run gives up that goes on with another.
CONTENT = {
    "rows": (
        "the data set: its rows, or how they are chosen (--max_length, --columns, --aspect, the shares of a mixture)",
        "rows may come twice or never",
    ),
    "dialog": ("the template", "the steps before asked the model another question"),
    "chat_template": ("the chat template of the tokenizer", "the steps before saw other turns"),
    "tokenizer": ("the tokenizer", "a token id may mean another text than in the steps before"),
    "base": (
        "the base model (the weights that the run began with)",
        "adapters and a frozen reference no longer belong to the model that they were trained beside",
    ),
    "steps": ("the number of steps", "the learning rate falls over another length"),
}


def identity(config: TrainConfig, rows: Any, steps: int, dialog: Any, base: str) -> dict[str, Any]:
    """What is compared, as JSON. rows: `Feed.identity`. base: `models.adapters.base_fingerprint` of the run's start."""
    options = {name: value for name, value in config.to_dict().items() if name not in APART}
    tokenizer = dialog.tokenizer
    return options | {
        "rows": rows,
        "dialog": dialog.to_dict(),
        "chat_template": _hash(tokenizer.get_chat_template()),
        "tokenizer": _hash(_rules(tokenizer)),
        "base": base,
        "steps": steps,
    }


def compare(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any], *, anyway: bool) -> None:
    """Say where the checkpoint at `path` is of a run that was `theirs`, and this one is `mine`. CheckpointError where
    one is not the other's continuation; anyway: that is said, with what is given up.
    """
    # What a checkpoint of an older version does not hold cannot differ.
    other = {
        k: _said(k, theirs.get(k), v)
        for k, v in mine.items()
        if theirs.get(k) != v and (k in theirs or k not in CONTENT)
    }
    tuned = [text for name, text in other.items() if name in TUNABLE]
    strange = {name: text for name, text in other.items() if name not in TUNABLE}
    if tuned:
        logger.warning("The run goes on, but no longer as it began: %s.", "; ".join(tuned))
    if not strange:
        return
    if not anyway:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(strange.values())}. Resume with what "
            f"{path.parent / 'config.yaml'} names as it was, start anew in another --output_dir, or give "
            "--resume_anyway to go on as another run."
        )
    given_up = [CONTENT[name][1] for name in strange if name in CONTENT]
    logger.warning(
        "--resume_anyway: %s is gone on from by another run: %s. Given up: that the result is the one that an "
        "uninterrupted run gives%s.",
        *(path, "; ".join(strange.values()), "".join(f"; {text}" for text in given_up)),
    )


def _said(name: str, was: Any, now: Any) -> str:
    if name not in CONTENT or name == "steps":
        return f"{CONTENT[name][0] if name in CONTENT else name} was {was!r}, is {now!r}"
    what, _ = CONTENT[name]
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return f"{what} is another"
    parts = [
        f"{k} was {was.get(k)!r}, is {now.get(k)!r}" for k in dict.fromkeys([*was, *now]) if was.get(k) != now.get(k)
    ]
    return f"{what} is another ({', '.join(parts)})"


def _rules(tokenizer: Any) -> str:
    """All by which a tokenizer makes ids of text; how it pads and cuts is no part of it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: rule for name, rule in rules.items() if name not in ("padding", "truncation")})


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
