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
import tomllib
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_folder, tiny_pairs

import dwrl_fast

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["csrc", "dwrl_fast", "kernels"]
SOURCES = [*FOLDERS, "setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "README.md", "LICENSE"]
COMPILER = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
PYTORCH = torch.__version__.split(".")[:2]
MODULE = f"dwrl_fast._C_torch{'_'.join(PYTORCH)}"
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
    """A function that copies the tree. Without `operators`, csrc has only the empty module, which compiles in
    seconds.
    """

    def copy(*, operators: bool = False) -> Path:
        root = tmp_path_factory.mktemp("checkout")
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=OUTPUTS)
            else:
                shutil.copy(source, root / name)
        (root / "kernels" / "probe.py").touch()  # a module that always exists
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


@pytest.mark.slow
def test_bare_clone(root: Path, environment: Callable[..., Path]) -> None:
    python = environment()
    found = probe(python, root)
    assert (found["package"], found["kernels"]) == (str(root / "dwrl_fast"), str(root / "kernels"))
    succeed([python, "-c", TRANSFORMERS], root)


@pytest.mark.slow
def test_wheel(in_wheel: Path, tmp_path: Path) -> None:
    found = probe(in_wheel, tmp_path)
    assert Path(found["package"]).parent.name == "site-packages"
    assert found["kernels"] == f"{found['package']}/kernels"


@pytest.mark.slow
def test_wheel_from_the_root_of_a_checkout(in_wheel: Path, root: Path) -> None:
    found = probe(in_wheel, root)
    assert (found["package"], found["kernels"]) == (str(root / "dwrl_fast"), str(root / "kernels"))
    succeed([in_wheel, "-c", TRANSFORMERS], root)


@pytest.mark.slow
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
    succeed([python, "-c", f"import torch, {MODULE}"], tmp_path)  # not `ops`: the module has no operators


def test_the_build_says_what_is_missing(root: Path, tmp_path: Path) -> None:
    """Without operators, the package accepts every PyTorch from the oldest tested version."""
    said = run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path], root, CXX="no-such-compiler"
    )
    assert said.returncode == 0
    assert "no-such-compiler is not on the PATH" in said.stderr
    asked = Parser().parsestr((tmp_path / "dwrl_fast.egg-info" / "PKG-INFO").read_text(encoding="utf-8"))
    assert "torch>=2.11" in asked.get_all("Requires-Dist", [])


@COMPILER
def test_a_source_that_does_not_compile_fails_the_build(checkout: Callable[..., Path], tmp_path: Path) -> None:
    root = checkout()
    (root / "csrc" / "broken.cpp").write_text("this is not C++\n")
    build: list[str | Path] = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path]
    assert run(build, root).returncode != 0


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, root: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not re.match(r"dwrl_fast-[^/]*\.dist-info/", name)}
    paths = [path.relative_to(root) for name in ("dwrl_fast", "kernels") for path in (root / name).rglob("*.*")]
    ours = {path.as_posix() for path in paths if "__pycache__" not in path.parts}
    ours = {f"dwrl_fast/{name}" if name.startswith("kernels/") else name for name in ours}
    assert {name for name in inside if not name.endswith(".so")} == ours


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.slow
@COMPILER
def test_the_wheel_depends_on_the_pytorch_that_it_was_compiled_for(wheel: Path) -> None:
    major, minor = map(int, PYTORCH)
    asked = metadata(wheel).get_all("Requires-Dist", [])
    assert f"torch<{major}.{minor + 1},>={major}.{minor}" in asked
    assert re.fullmatch(r"dwrl_fast-[\d.]+-cp311-abi3-\w+\.whl", wheel.name), "one wheel for every Python from 3.11"
    inside = zipfile.ZipFile(wheel).namelist()
    assert [name for name in inside if name.endswith(".so")] == [f"{MODULE.replace('.', '/')}.abi3.so"]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)


ANOTHER_PYTORCH = """
import runpy, sys, torch
torch.__version__ = "2.99.1+cu199"
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@COMPILER
def test_the_wheel_of_a_source_distribution_runs_without_a_compiler(
    checkout: Callable[..., Path], environment: Callable[..., Path], tmp_path: Path
) -> None:
    """It trains outside a checkout and runs with a lower instruction set than that of the build. It refuses another
    PyTorch.
    """
    root = checkout(operators=True)
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    succeed([sys.executable, "-c", build], root)
    (sdist,) = (root / "dist").glob("*.tar.gz")
    wheel = build_wheel(sdist, tmp_path)
    python = environment(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert [n for n in archive.namelist() if n.endswith(".so")] == [f"{MODULE.replace('.', '/')}.abi3.so"]
    shutil.rmtree(root)
    place = tmp_path / "place"
    model, pairs = tiny_folder(place / "tiny"), tiny_pairs(place / "pairs.jsonl")
    alone = {"PATH": str(place), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}  # the PATH has no compiler

    examined: list[str | Path] = [python, "-m", "dwrl_fast.ops.extension"]
    assert "They run with DEFAULT." in succeed(examined, place, **alone, ATEN_CPU_CAPABILITY="default")
    options: list[str | Path] = ["dwrl_fast.train", "--model_name_or_path", model, "--dataset_name", pairs]
    options += ["--max_steps", "2", "--max_completion_length", "4", "--output_dir"]
    said = succeed([python, "-m", *options, "run"], place, **alone)
    for operator in ("linear_policy_loss", "tree_attention", "cache_attention", "yes_no_logprob"):
        assert re.search(rf"{operator} on cpu in torch.float32: backend cpu \((AVX512|AVX2|DEFAULT)\)", said)
    assert (place / "run" / "model" / "model.safetensors").is_file()

    refused = run([python, "-c", ANOTHER_PYTORCH, *options, "refused"], place, **alone)
    assert refused.returncode == 2
    theirs = ".".join(PYTORCH)
    assert f"compiled for PyTorch {theirs}, and this is PyTorch 2.99.1+cu199" in refused.stderr
    assert f"pip install 'torch=={theirs}.*'" in refused.stderr
    examined = [python, "-c", ANOTHER_PYTORCH, "dwrl_fast.ops.extension"]
    assert run(examined, place, **alone).returncode == 1


def test_a_release_has_one_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    headings = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert cited == headings[0] == dwrl_fast.__version__


def test_the_same_pythons_are_named_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    kept = [name.rpartition(" :: 3.")[2] for name in project["classifiers"] if " :: Python :: 3." in name]
    first, last = int(kept[0]), int(kept[-1])
    assert project["requires-python"] == f">=3.{first},<3.{last + 1}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"PYTHON ?= {' '.join(f'python3.{minor}' for minor in kept)} python3\n" in makefile
    assert f"(3, {first}) <= sys.version_info < (3, {last + 1})" in makefile
    for name in ("README.md", "Makefile"):
        assert f"Python 3.{first} to 3.{last}" in (ROOT / name).read_text(encoding="utf-8")


def test_the_image_is_built_of_what_is_there() -> None:
    """Few machines have Docker, so this tests what can be tested without it."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    copies = [line.split() for line in lines if line.startswith("COPY ") and "--from" not in line]
    copied = {name for _, *names, _ in copies for name in names}
    assert copied == {*FOLDERS, "constraints.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in copied)
    context = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in context if line.startswith("!")} == copied
    installs = [line for line in lines if "pip install" in line]
    assert installs and all("-c constraints.txt" in line for line in installs), "the versions that are tested together"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (python,) = {found for line in lines for found in re.findall(r"python(3\.\d+)", line)}
    assert any(name.endswith(f" :: {python}") for name in project["classifiers"])
    extras = {name for line in installs for name in re.findall(r"\.\[([\w,]+)\]", line)}
    assert all(name in project["optional-dependencies"] for names in extras for name in names.split(","))


def test_our_kernels_folder_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's `kernels` from transformers"
