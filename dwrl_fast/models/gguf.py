"""Loads GGUF files (llama.cpp's format) of the architectures that transformers can read.

Config, weights and tokenizer come from the file alone, not from other files in its folder. The weights are dequantised
when they are read. The result is a plain model and is saved as an ordinary folder.
"""

import shlex
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.log import logger, warn_once

NEEDS = (
    "It must be one whole GGUF file of a language model, of an architecture that transformers reads. In place of any "
    "other, give the folder or hub name that the file was made from."
)
SPLIT_AS_GPT2 = ("gpt-2", "smollm")  # SmolLM's rule also splits digits, which its merges never join


def is_gguf(name_or_path: str | None) -> bool:
    """Whether the name of a model is a GGUF file."""
    return name_or_path is not None and Path(name_or_path).suffix.lower() == ".gguf"


@contextmanager
def source(name_or_path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A context with the arguments of `from_pretrained` for a name: a folder or hub name, and keyword arguments, which
    are empty except for a GGUF file.

    Raises ModelError if the file is missing or not a GGUF file, or if packages to read it are not installed.
    """
    if not is_gguf(name_or_path):
        yield name_or_path, {}
        return
    _metadata(name_or_path)
    # An empty folder, because a tokenizer.json or an adapter next to the file would have priority over the file.
    with TemporaryDirectory() as empty:
        yield empty, {"gguf_file": str(Path(name_or_path).absolute())}


def dequantising(options: dict[str, Any], name: str) -> dict[str, Any]:
    """`options` of a model's `from_pretrained`, extended so that the GGUF file `name` is dequantised, because packed
    weights cannot be trained.

    Raises ConfigError if the options already contain a quantisation.
    """
    from transformers import GgufConfig

    if "quantization_config" in options:
        raise ConfigError(
            f"--load_in_4bit quantises a model when it is loaded, but {name} is quantised already: leave the option "
            "out, or give the folder or hub name that the file was made from"
        )
    return options | {"quantization_config": GgufConfig(dequantize=True)}


def say_dequantised(model: Any, name: str) -> None:
    """Log the dtype of `model`, read from the GGUF file `name`, and set the name in its config."""
    assert not hasattr(model.config, "quantization_config"), "what is saved would not load again"
    model.config.name_or_path = name
    logger.info("%s: weights dequantised to %s", name, str(model.dtype).removeprefix("torch."))


def check_split(tokenizer: Any, name: str) -> None:
    """Warn if transformers does not know the rule by which the tokenizer of the GGUF file `name` splits text.

    The file holds only the name of the rule, and transformers uses GPT-2's rule for an unknown name. Also sets the
    tokenizer's name_or_path.
    """
    tokenizer.name_or_path = name
    rule = _metadata(name).get("tokenizer.ggml.pre")
    taken = type(tokenizer.backend_tokenizer.pre_tokenizer).__name__
    if rule is not None and rule not in SPLIT_AS_GPT2 and taken == "ByteLevel":
        warn_once(
            f"{name} splits text by the rule {rule!r}, which transformers does not know. GPT-2's rule is used "
            "instead, so some ids may differ from those of the model's training. If the model's own tokenizer is "
            "available, give it with --tokenizer_name_or_path."
        )


def _metadata(name: str) -> dict[str, Any]:
    """The metadata of the file; for arrays of texts only their lengths."""
    from transformers.integrations import gguf as reader

    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if not hasattr(reader, "get_gguf_tokenizer"):
        missing.append("transformers>=5.18")  # older versions confuse the tokens that begin and end a turn
    if missing:
        needed = ", ".join(missing)
        raise ModelError(f"{name}: reading a GGUF file needs {needed}; run `pip install {shlex.join(missing)}`")
    if not Path(name).is_file():
        raise ModelError(f"there is no file {name}: GGUF files are read only from this machine, so fetch it first")
    try:
        return dict(reader.read_gguf_metadata(name)[0])
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise ModelError(f"{name} cannot be read as a GGUF file: {str(error).rstrip('.')}. {NEEDS}") from error
