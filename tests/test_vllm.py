"""vLLM itself on the CPU, run by the Python that has it: its output, and that its weights are never stale.

`make vllm` makes that Python's environment; DWRL_FAST_VLLM_PYTHON names another.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
CASES = ["in_process", "by_server", "restart", "died", "killed", "refused", "nccl"]
WITH_SMOLLM2 = ["smollm2_in_process", "smollm2_by_server"]


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    python = Path(os.environ.get("DWRL_FAST_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"vLLM is not at {python}: make vllm")
    return python


def show(python: Path, case: str, folder: Path) -> None:
    """Run a case until it ends."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{here}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if openmp.is_file():  # vLLM's manual recommends it
        environment["LD_PRELOAD"] = str(openmp)
    command = [str(python), str(here / "vllm_cases.py"), case, str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0 and f"ok {case}" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-6000:]
    print(ran.stdout, file=sys.stderr)


@pytest.mark.parametrize("case", CASES)
def test_with_a_tiny_model(vllm_python: Path, case: str, tmp_path: Path) -> None:
    show(vllm_python, case, tmp_path)


@pytest.mark.parametrize("case", WITH_SMOLLM2)
def test_with_smollm2(vllm_python: Path, case: str, tmp_path: Path) -> None:
    if not (ROOT / "models" / "smollm2").is_dir():
        pytest.skip("models/smollm2 is not there: make smollm2")
    show(vllm_python, case, tmp_path)
