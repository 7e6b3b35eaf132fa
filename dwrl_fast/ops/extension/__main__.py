"""`python -m dwrl_fast.ops.extension` reports whether the C++ operators are available, and exits with 1 if not."""

import sys

import torch

from dwrl_fast.ops import extension

if __name__ == "__main__":
    message = extension.problem()
    print(
        message
        or f"dwrl_fast: the C++ operators are built for PyTorch {torch.__version__} and load. They run with "
        f"{extension.instruction_set()}."
    )
    sys.exit(message is not None)
