"""Loads the compiled C++ operators once. If they are missing, a message gives the command that builds them.

`python -m dwrl_fast.ops.extension` reports whether they are available, and exits with 1 if not.
"""

import functools
import importlib
import sys
from pathlib import Path

MISSING = """\
*** dwrl_fast runs WITHOUT its C++ operators: {reason}.
Everything works, but operators on the CPU take the slower PyTorch path. To build them, install a C++20 compiler and the
headers of Python (Debian, Ubuntu: apt-get install g++ python3-dev; Fedora: dnf install gcc-c++ python3-devel), then:
    {command}"""


@functools.cache
def problem() -> str | None:
    """Register the C++ operators in `torch.ops.dwrl_fast`: None, or what is wrong with them and how to repair it."""
    import torch  # noqa: F401  the extension links against its libraries

    try:
        importlib.import_module("dwrl_fast._C")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "dwrl_fast._C"
        reason = "they were not compiled when it was installed" if absent else f"they do not load here ({error})"
        checkout = Path(__file__).parents[3]
        source = str(checkout) if (checkout / "csrc").is_dir() else "<checkout of dwrl_fast>"
        command = f"cd {source} && {sys.executable} -m pip install --no-build-isolation --no-deps -e ."
        return MISSING.format(reason=reason, command=command)
    return None
