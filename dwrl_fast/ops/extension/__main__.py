"""`python -m dwrl_fast.ops.extension` says whether the C++ operators are there, and exits with 1 where they are not."""

import sys

from dwrl_fast.ops import extension

if __name__ == "__main__":
    message = extension.problem()
    print(message or "dwrl_fast: the C++ operators are built and load.")
    sys.exit(message is not None)
