"""`python -m dwrl_fast.ops.extension` says whether the C++ operators are there, and exits with 1 where they are not."""

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
