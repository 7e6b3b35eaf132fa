"""The package as people get it: bare clone, editable, wheel, with and without a compiler. Nothing is downloaded.

Each environment sees the libraries of the running one and, before them, a stand-in for Hugging Face's `kernels`: a
regular top-level package with the name of our folder, which transformers imports wherever it finds it installed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["csrc", "dwrl_fast", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt"]
OUTPUTS = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")

STAND_IN = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: (lambda wrapped: wrapped)
"""

PROBE = """
import importlib, json, pathlib
import dwrl_fast, dwrl_fast.kernels.probe, kernels
(folder,) = map(pathlib.Path, dwrl_fast.kernels.__path__)
for path in folder.glob("*.py"):
    importlib.import_module(f"dwrl_fast.kernels.{path.stem}")
package = pathlib.Path(dwrl_fast.__file__).parent
print(json.dumps({"package": str(package), "kernels": str(folder), "hub": kernels.__file__}))
"""

TRANSFORMERS = """
import torch, transformers
from transformers.utils import is_kernels_available
assert is_kernels_available()
config = transformers.LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)
assert transformers.AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 8)
"""


def run(command: list[str | Path], cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CXX", "CC")}
    offline = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=inherited | offline | environ, capture_output=True, text=True)


def succeed(command: list[str | Path], cwd: Path, **environ: str) -> str:
    result = run(command, cwd, **environ)
    assert result.returncode == 0, f"{command} in {cwd}:\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that copies the tree; without `operators` csrc keeps the empty module only, compiled in seconds."""

    def copy(*, operators: bool = False) -> Path:
        root = tmp_path_factory.mktemp("checkout")
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=OUTPUTS)
            else:
                shutil.copy(source, root / name)
        (root / "kernels" / "probe.py").touch()  # one module that is there, whatever else is
        for path in (root / "csrc").iterdir():
            if not operators and path.name != "module.cpp":
                path.unlink()
        return root

    return copy


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes a virtual environment with the stand-in, installs into it, and returns its interpreter."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    def make(*install: str | Path, **environ: str) -> Path:
        root = tmp_path_factory.mktemp("environment")
        succeed([sys.executable, "-m", "venv", "--without-pip", root], root)
        python = root / "bin" / "python"
        site = Path(succeed([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], root).strip())
        (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").write_text(STAND_IN)
        (site / f"kernels-{KERNELS_MIN_VERSION}.dist-info").mkdir()
        (site / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
        )
        if install:
            pip: list[str | Path] = [python, "-m", "pip", "install", "--ignore-installed", "--no-deps"]
            succeed([*pip, "--no-build-isolation", *install], root, **environ)
        return python

    return make


@pytest.fixture(scope="session")
def root(checkout: Callable[..., Path]) -> Path:
    return checkout()


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(root, tmp_path_factory.mktemp("wheel"))


def build_wheel(source: Path, folder: Path) -> Path:
    pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    succeed([*pip, "--wheel-dir", folder, source], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def in_wheel(environment: Callable[..., Path], wheel: Path) -> Path:
    return environment(wheel)


def probe(python: Path, cwd: Path) -> dict:
    found = json.loads(succeed([python, "-c", PROBE], cwd, OMP_NUM_THREADS="1").splitlines()[-1])
    assert found["hub"] == str(next(python.parent.parent.glob("lib/*/site-packages/kernels/__init__.py")))
    return found


def test_bare_clone(root: Path, environment: Callable[..., Path]) -> None:
    python = environment()
    found = probe(python, root)
    assert (found["package"], found["kernels"]) == (str(root / "dwrl_fast"), str(root / "kernels"))
    succeed([python, "-c", TRANSFORMERS], root)


def test_wheel(in_wheel: Path, tmp_path: Path) -> None:
    found = probe(in_wheel, tmp_path)
    assert Path(found["package"]).parent.name == "site-packages"
    assert found["kernels"] == f"{found['package']}/kernels"


def test_wheel_from_the_root_of_a_checkout(in_wheel: Path, root: Path) -> None:
    found = probe(in_wheel, root)
    assert (found["package"], found["kernels"]) == (str(root / "dwrl_fast"), str(root / "kernels"))
    succeed([in_wheel, "-c", TRANSFORMERS], root)


def test_editable_without_a_compiler_and_then_with_one(
    checkout: Callable[..., Path], environment: Callable[..., Path], tmp_path: Path
) -> None:
    root = checkout()
    python = environment("-e", root, PATH=str(tmp_path))
    found = probe(python, tmp_path)
    assert (found["package"], found["kernels"]) == (str(root / "dwrl_fast"), str(root / "kernels"))

    check: list[str | Path] = [python, "-m", "dwrl_fast.ops.extension"]
    said = run(check, tmp_path)
    assert said.returncode == 1
    assert "WITHOUT its C++ operators" in said.stdout
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler here: the command that builds the operators was not tried")
    mend = said.stdout.splitlines()[-1].strip()
    succeed(["bash", "-c", mend.replace(" install ", " install --ignore-installed ")], tmp_path)
    succeed([python, "-c", "import torch, dwrl_fast._C"], tmp_path)  # a module without operators: `ops` would miss them


def test_the_build_says_what_is_missing(root: Path, tmp_path: Path) -> None:
    build: list[str | Path] = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path]
    said = run(build, root, CXX="no-such-compiler")
    assert said.returncode == 0
    assert "no-such-compiler is not on the PATH" in said.stderr


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_a_source_that_does_not_compile_fails_the_build(checkout: Callable[..., Path], tmp_path: Path) -> None:
    root = checkout()
    (root / "csrc" / "broken.cpp").write_text("this is not C++\n")
    build: list[str | Path] = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path]
    assert run(build, root).returncode != 0


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, root: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not re.match(r"dwrl_fast-[^/]*\.dist-info/", name)}
    paths = [path.relative_to(root) for name in ("dwrl_fast", "kernels") for path in (root / name).rglob("*.*")]
    ours = {path.as_posix() for path in paths if "__pycache__" not in path.parts}
    ours = {f"dwrl_fast/{name}" if name.startswith("kernels/") else name for name in ours}
    assert {name for name in inside if not name.endswith(".so")} == ours


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_operators_from_the_source_distribution(
    checkout: Callable[..., Path], environment: Callable[..., Path], tmp_path: Path
) -> None:
    root = checkout(operators=True)
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    succeed([sys.executable, "-c", build], root)
    (sdist,) = (root / "dist").glob("*.tar.gz")
    python = environment(build_wheel(sdist, tmp_path))
    assert "are built" in succeed([python, "-m", "dwrl_fast.ops.extension"], tmp_path)
    names = "import torch, dwrl_fast._C; print(torch._C._dispatch_get_all_op_names())"
    assert "dwrl_fast::" in succeed([python, "-c", names], tmp_path)


def test_our_kernels_folder_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's `kernels` from transformers"
