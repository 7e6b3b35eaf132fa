"""Maps the packages, builds the C++ (and, on request, CUDA) operators, and lists the dependencies. All other settings
are in pyproject.toml.

Every `csrc/*.cpp` becomes part of one module, `dwrl_fast._C_torchX_Y`. It loads only into PyTorch X.Y, because each
minor version changes the C++ interface. Its name has that version, and a package that is built with it depends on that
version. It uses Python's limited interface, so one file serves every Python from 3.11. If something that the build
needs is missing, a message says so, here and in `python -m dwrl_fast.ops.extension`, and the install succeeds. A source
that does not compile fails the install.

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


def pytorch() -> tuple[int, int]:
    """The version of PyTorch that the operators are compiled for."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = {"cxx": ["-O3", "-std=c++20", *openmp]}
    major, minor = pytorch()
    sources = sorted(map(str, Path("csrc").glob("*.cpp")))
    cuda_sources = sorted(map(str, Path("csrc").glob("*.cu")))
    kind = CppExtension
    if cuda_sources and with_cuda():
        kind, sources = CUDAExtension, sources + cuda_sources
        flags["nvcc"] = ["-O3", "-std=c++20"]
    module = kind(
        f"dwrl_fast._C_torch{major}_{minor}",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=flags,
        extra_link_args=openmp,
        py_limited_api=True,
    )
    tag = {"bdist_wheel": {"py_limited_api": "cp311"}}
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}, "options": tag}


def requirements() -> list[str]:
    """The lower bounds are the oldest that the tests were run with (docs/install.md says how)."""
    torch = ">=2.11"
    if not absent:
        major, minor = pytorch()
        torch = f">={major}.{minor},<{major}.{minor + 1}"
    return [
        f"torch{torch}",
        "transformers>=5.17",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "safetensors",
        "datasets>=5.2",  # from 4.0 to 5.1 its reader "pandas" unpickles, and a data set's name alone asks for it
        "pyarrow>=24",  # as that datasets asks
        "pyyaml",
        "rich",
        "matplotlib",
        "xxhash",
    ]


absent = missing()
if absent:
    print(f"\n*** dwrl_fast is built WITHOUT its C++ operators: missing is {absent}.\n", file=sys.stderr)

kernels = find_namespace_packages(include=["kernels", "kernels.*"], exclude=["*.__pycache__"])
setup(
    packages=[*find_packages(include=["dwrl_fast", "dwrl_fast.*"]), *(f"dwrl_fast.{name}" for name in kernels)],
    package_dir={"dwrl_fast": "dwrl_fast", "dwrl_fast.kernels": "kernels"},
    install_requires=requirements(),
    **({} if absent else extension()),
)
