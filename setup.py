"""Maps the packages and builds the C++ (and, on request, CUDA) operators. Everything else is in pyproject.toml.

Every `csrc/*.cpp` becomes part of the module `dwrl_fast._C`. If something that the build needs is missing, a message
says so, here and in `python -m dwrl_fast.ops.extension`, and the install succeeds. A source that does not compile fails
the install.

Environment: `CXX` names the compiler; `DWRL_FAST_CUDA` 1 or 0 builds or omits `csrc/*.cu`. By default they are built if
a CUDA toolkit (`CUDA_HOME`) and a CUDA build of PyTorch are found, with or without a GPU.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

os.chdir(Path(__file__).resolve().parent)  # the extension's sources must be relative, for the source distribution


def missing() -> str | None:
    """What the C++ operators need but this environment lacks; None if nothing is missing."""
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return f"PyTorch, at build time ({error}); with --no-build-isolation the installed one is used"
    if not shutil.which(get_cxx_compiler()):
        return f"a C++ compiler ({get_cxx_compiler()} is not on the PATH)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"the headers of Python ({sysconfig.get_path('include')}/Python.h)"
    return None


def with_cuda() -> bool:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    flag = os.environ.get("DWRL_FAST_CUDA")
    if flag not in (None, "0", "1"):
        sys.exit(f"DWRL_FAST_CUDA is {flag!r}: 1 builds the CUDA operators, 0 leaves them out")
    found = CUDA_HOME is not None and torch.version.cuda is not None
    if flag == "1" and not found:
        sys.exit(
            f"DWRL_FAST_CUDA=1 needs a CUDA toolkit (CUDA_HOME: {CUDA_HOME}) and a CUDA build of PyTorch "
            f"({torch.__version__} has CUDA {torch.version.cuda})"
        )
    return found if flag is None else flag == "1"


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = {"cxx": ["-O3", "-std=c++20", *openmp]}
    sources = sorted(map(str, Path("csrc").glob("*.cpp")))
    cuda_sources = sorted(map(str, Path("csrc").glob("*.cu")))
    kind = CppExtension
    if cuda_sources and with_cuda():
        kind, sources = CUDAExtension, sources + cuda_sources
        flags["nvcc"] = ["-O3", "-std=c++20"]
    module = kind(
        "dwrl_fast._C",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=flags,
        extra_link_args=openmp,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


absent = missing()
if absent:
    print(f"\n*** dwrl_fast is built WITHOUT its C++ operators: missing is {absent}.\n", file=sys.stderr)

kernels = find_namespace_packages(include=["kernels", "kernels.*"], exclude=["*.__pycache__"])
setup(
    packages=[*find_packages(include=["dwrl_fast", "dwrl_fast.*"]), *(f"dwrl_fast.{name}" for name in kernels)],
    package_dir={"dwrl_fast": "dwrl_fast", "dwrl_fast.kernels": "kernels"},
    **({} if absent else extension()),
)
