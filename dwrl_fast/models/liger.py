"""Liger's Triton kernels in a loaded Hugging Face model: RMSNorm, rotary embedding and the gated MLP."""

import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.log import logger
from dwrl_fast.ops.backend import interpreted

_original: dict[str, dict[str, Any]] = {}  # by module of a model family: what Liger replaced in it


@contextmanager
def without_liger() -> Iterator[None]:
    """A context in which models of the families that Liger replaced can be loaded and run on a CPU. A model that
    `use_liger` changed keeps Liger's layers and runs only on a GPU.
    """
    liger = {name: {key: vars(sys.modules[name])[key] for key in code} for name, code in _original.items()}
    try:
        for name, code in _original.items():
            vars(sys.modules[name]).update(code)
        yield
    finally:
        for name, code in liger.items():
            vars(sys.modules[name]).update(code)


def use_liger(lm: Any) -> None:
    """Replace the layers of `lm` that Liger has kernels for. Parameters stay the same, and results are equal up to
    rounding.

    The head and its loss are not replaced, because this package has its own fused operators. The rotary embedding is
    replaced in the module of the model family, so afterwards every model of this family in the process must be on a
    GPU, except within `without_liger`.

    Raises ConfigError off CUDA and without liger-kernel, and ModelError for a family that Liger does not know.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("--use_liger_kernel: liger-kernel is not installed (pip install liger-kernel)")
    if lm.device.type != "cuda" and not interpreted():
        raise ConfigError(
            f"--use_liger_kernel: the model is on {lm.device.type}, but Liger needs CUDA; leave the option out "
            "(and --cpu_offload, which keeps the model on the CPU, if it is given)"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as FAMILIES

    code = vars(sys.modules[type(lm).__module__])
    before = dict(code)

    family = lm.config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"--use_liger_kernel: Liger does not know the family {family!r} of {type(lm).__name__}; leave the option "
            f"out, or take one of {', '.join(sorted(FAMILIES))}"
        )
    apply = FAMILIES[family]
    losses = {"cross_entropy", "fused_linear_cross_entropy"} & inspect.signature(apply).parameters.keys()
    apply(model=lm, **dict.fromkeys(losses, False))
    replaced_code = {name: value for name, value in before.items() if code[name] is not value}
    _original.setdefault(type(lm).__module__, replaced_code)
    replaced = Counter(name for m in lm.modules() if (name := m._get_name()).startswith("Liger"))
    if not replaced:
        raise ModelError(
            f"--use_liger_kernel: Liger found nothing to replace in {type(lm).__name__}; leave the option out"
        )
    logger.info("Liger in %s: %s", type(lm).__name__, ", ".join(f"{n} {name}" for name, n in sorted(replaced.items())))
