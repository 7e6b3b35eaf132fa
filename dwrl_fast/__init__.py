"""Generative preference models trained with Dual-Weighted Reinforcement Learning, and the fused operators that it uses.

Importing this package is cheap: `dwrl_fast.ops` and the other public names are loaded at their first use, and so are
transformers and vLLM.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwrl_fast import ops
    from dwrl_fast.scoring.scorer import Scorer

__version__ = "0.2.0"
__all__ = ["Scorer", "__version__", "ops"]

# In a checkout `kernels/` is next to this package, in a wheel it is inside it; both are imported as
# `dwrl_fast.kernels`. `kernels/` must never get an `__init__.py`: a regular package of that name would hide Hugging
# Face's `kernels`, which transformers imports.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("dwrl_fast.ops")
    if name == "Scorer":
        return importlib.import_module("dwrl_fast.scoring.scorer").Scorer
    raise AttributeError(f"module 'dwrl_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
