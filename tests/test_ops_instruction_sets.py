"""The operators' tests with each instruction set below that of this processor, as on another machine.

ATEN_CPU_CAPABILITY limits the kernels of PyTorch and of this package; the other two variables limit the libraries that
multiply matrices. A process reads them only once, so each set needs a separate process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dwrl_fast.ops import extension

pytestmark = pytest.mark.skipif(extension.problem() is not None, reason="the C++ operators are not built")

SETS = ("DEFAULT", "AVX2", "AVX512")  # ascending, as PyTorch calls them
LOWERED = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
RUN = """
import sys, pytest, torch
found = torch.backends.cpu.get_cpu_capability()
assert found == sys.argv[1], f"asked for {sys.argv[1]}, and PyTorch took {found}"
from dwrl_fast.ops import extension
assert extension.problem() is None and extension.instruction_set() == found
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def run_under(instructions: str, names: tuple[str, ...], selected: str, capsys: pytest.CaptureFixture[str]) -> None:
    native = torch.backends.cpu.get_cpu_capability()
    lower = SETS[: SETS.index(native)] if native in SETS else ()
    if instructions not in lower:
        pytest.skip(f"this processor's own set is {native}; below it are: {', '.join(lower) or 'none'}")
    files = [str(Path(__file__).with_name(f"test_ops_{name}.py")) for name in names]
    command = [sys.executable, "-c", RUN, instructions, "-k", selected, *files]
    run = subprocess.run(command, env=os.environ | LOWERED[instructions], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    with capsys.disabled():
        print(f"\n{instructions} on a processor with {native}: {run.stdout.splitlines()[-1]}")


@pytest.mark.parametrize("instructions", ["AVX2"])
def test_some_of_the_operators_tests(instructions: str, capsys: pytest.CaptureFixture[str]) -> None:
    selected = "(test_trees and forest) or (test_shapes and 4099)"
    run_under(instructions, ("accuracy", "attention", "cache"), selected, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", LOWERED)
def test_all_of_the_operators_tests(instructions: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All tests except those of compiling and opcheck, for which the instruction set makes no difference."""
    names = ("accuracy", "attention", "cache", "contract", "edges", "weights")
    run_under(instructions, names, "not compile and not opcheck", capsys)
