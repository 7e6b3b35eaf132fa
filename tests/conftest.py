"""Shared fixtures: where the real preference data and tokenizers lie, when they are there at all."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and tokenizers, named by DWRL_FAST_SHARED or lying beside the checkout as `shared`."""
    folder = Path(os.environ.get("DWRL_FAST_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; name its parent folder in DWRL_FAST_SHARED")
    return folder
