"""Shared fixtures: the real preference data and tokenizers, if available; a pickle that reports when it is loaded; and
the marker for tests that need a GPU.
"""

import getpass
import logging
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from dwrl_fast.log import logger

ROOT = Path(__file__).resolve().parent.parent

# A property is tested on the same examples every time, and a slow moment of the machine is no failure.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

# What the surroundings say about terminals and proxies.
for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

os.environ["HF_HUB_OFFLINE"] = "1"  # without a network, every name that is looked up would take 20 seconds of retries

# torch.compile's cache does not record the instruction set: code compiled under a lowered ATEN_CPU_CAPABILITY corrupts
# the memory of a process with a wider one.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), f"dwrl_fast_tests_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}"
)


@pytest.fixture(autouse=True)
def propagating() -> None:
    """Remove the log handler that a command in an earlier test left. Otherwise caplog would see messages twice, or not
    at all.
    """
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and tokenizers, named by DWRL_FAST_SHARED, or `shared` next to the checkout."""
    folder = Path(os.environ.get("DWRL_FAST_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; name its parent folder in DWRL_FAST_SHARED")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model in `tiny` and pairs for it in `pairs.jsonl`."""
    from tiny import tiny_folder, tiny_pairs

    tiny_folder(tmp_path / "tiny")
    tiny_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder for all tests of a module, which must not change it."""
    from tiny import tiny_folder, tiny_pairs

    made = tmp_path_factory.mktemp("tiny")
    tiny_folder(made / "tiny")
    tiny_pairs(made / "pairs.jsonl")
    return made


class Payload:
    """An object that creates the file `ran` when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


@pytest.fixture
def unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a pickle in the working folder creates when it is loaded, with a `datasets` whose pandas reader
    unpickles, as before version 5.2.
    """
    reader = pytest.importorskip("datasets.packaged_modules.pandas.pandas", reason="this version has no such reader")
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")

    def generate(self: Any, files: list[str]) -> Iterator[Any]:
        for i, file in enumerate(files):
            yield i, pyarrow.Table.from_pandas(pandas.read_pickle(file))

    monkeypatch.setattr(reader.Pandas, "_generate_tables", generate)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    ran = tmp_path / "ran"
    for name in ("data.pkl", "data/train_prefs-0", "data/test_prefs-0"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(pickle.dumps(Payload(ran)))
    return ran


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
