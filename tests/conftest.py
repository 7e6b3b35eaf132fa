"""Shared fixtures: where the real preference data and tokenizers lie, when they are there at all; and the tests that
need a GPU.
"""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# What torch.compile keeps does not say which instruction set it is for: made under a lowered ATEN_CPU_CAPABILITY, it
# corrupts the memory of a process that has a wider one.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), f"dwrl_fast_tests_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}"
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and tokenizers, named by DWRL_FAST_SHARED or lying beside the checkout as `shared`."""
    folder = Path(os.environ.get("DWRL_FAST_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; name its parent folder in DWRL_FAST_SHARED")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
