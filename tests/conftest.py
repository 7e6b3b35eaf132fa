"""Shared fixtures: where the real preference data and tokenizers lie, when they are there at all; and the tests that
need a GPU.
"""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


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
