"""Loads the compiled C++ operators once. If they are missing, a message gives the command that builds them.

`python -m dwrl_fast.ops.extension` reports whether they are available, and exits with 1 if not. The operators load only
into the minor version of PyTorch that they were compiled for, so that version is part of the module's name.
"""

import functools
import importlib
import sys
from pathlib import Path

import torch  # first: the extension links against its libraries

MISSING = """\
*** dwrl_fast runs WITHOUT its C++ operators: {reason}.
Everything works, but operators on the CPU take the slower PyTorch path. To build them, install a C++20 compiler and the
headers of Python (Debian, Ubuntu: apt-get install g++ python3-dev; Fedora: dnf install gcc-c++ python3-devel), then:
    {command}"""
OTHER = """\
the C++ operators of this dwrl_fast are compiled for PyTorch {theirs}, and this is PyTorch {ours}.
Install PyTorch {theirs}:
    {python} -m pip install 'torch=={theirs}.*'
or compile them for this one:
    {command}"""
PREFIX = "_C_torch"


@functools.cache
def compiled() -> tuple[str, ...]:
    """The versions of PyTorch, as "2.13", that operators were compiled for."""
    found = {path.name.split(".")[0] for path in Path(__file__).parents[2].glob(f"{PREFIX}*.so")}
    return tuple(sorted(name.removeprefix(PREFIX).replace("_", ".") for name in found))


def refusal() -> str | None:
    """If operators were compiled, but only for other versions of PyTorch: the versions and the remedy; else None.
    Nothing runs then, because the fallback would be much slower than what was installed.
    """
    if not compiled() or _ours() in compiled():
        return None
    found = {"ours": torch.__version__, "theirs": compiled()[-1]}
    return OTHER.format(**found, python=sys.executable, command=_command())


@functools.cache
def problem() -> str | None:
    """Register the C++ operators in `torch.ops.dwrl_fast`: None, or what is wrong with them and how to repair it."""
    other = refusal()
    if other is not None:
        return other
    name = f"dwrl_fast.{PREFIX}{_ours().replace('.', '_')}"
    try:
        importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        reason = "they were not compiled when it was installed" if absent else f"they do not load here ({error})"
        return MISSING.format(reason=reason, command=_command())
    instruction_set()  # cached here, outside of any tracing
    return None


@functools.cache
def instruction_set() -> str:
    """The instruction set of the C++ operators on this processor: AVX512, AVX2, or DEFAULT (plain x86-64)."""
    return str(torch.ops.dwrl_fast.instruction_set())


def _ours() -> str:
    """The major and minor version of the installed PyTorch."""
    return ".".join(torch.__version__.split(".")[:2])


def _command() -> str:
    """The command that compiles the operators."""
    checkout = Path(__file__).parents[3]
    source = str(checkout) if (checkout / "csrc").is_dir() else "<checkout of dwrl_fast>"
    return f"cd {source} && {sys.executable} -m pip install --no-build-isolation --no-deps -e ."
