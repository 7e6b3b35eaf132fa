"""`python -m dwrl_fast.ops.extension` reports whether the C++ operators are available, and exits with 1 if not."""

import sys

from dwrl_fast.ops import extension

if __name__ == "__main__":
    message = extension.problem()
    print(message or "dwrl_fast: the C++ operators are built and load.")
    sys.exit(message is not None)
