"""The doctor as a command: without arguments, on SmolLM2, and over two ranks."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny import tiny_folder, tiny_pairs

pytestmark = pytest.mark.slow
RANKS = {"collectives", "uneven ranks", "sharded gradients", "replicas", "peak memory"}


def doctor(
    folder: Path, *arguments: object, launch: tuple[str, ...] = ("-m", "dwrl_fast.doctor"), fault: str = ""
) -> Any:
    """The command's process, and the statuses in its report by name; None if it wrote no report."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": fault}
    command = [sys.executable, *launch, *map(str, arguments), "--json", str(report)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    if not report.exists():
        return done, None
    findings = json.loads(report.read_text())["findings"]
    return done, {each["name"]: each["status"] for each in findings}


def test_without_arguments(tmp_path: Path) -> None:
    done, found = doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(found.values()) == {"pass"} and len(found) == 19, found
    assert "the embedded model (warmed up in" in done.stdout and "19 pass, 0 warn, 0 fail" in done.stdout


def test_smollm2(tmp_path: Path) -> None:
    """On the packaged rows. Its label mass is below one half, and thoughts are cut; everything else passes."""
    model = ROOT / "models" / "smollm2"
    if not model.is_dir():
        pytest.skip("models/smollm2 is not here: make smollm2")
    given = ("--limit", 2, "--max_completion_length", 16, "--num_generations", 2)
    done, found = doctor(tmp_path, "--model_name_or_path", model, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, status in found.items() if status == "warn"} <= {"label mass", "thoughts", "memory"}, found


FAULTS = [
    ("", set()),
    ("replica", {"replicas", "fresh weights"}),
    ("sum", {"collectives"}),
    ("gradient", {"sharded gradients"}),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "tiny")
    tiny_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


def over_two_ranks(place: Path, fault: str) -> Any:
    """As `doctor`. A rank that waits in vain for the other gives up before the test does."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "tests/doctor_drill.py"))
    given = ("--model_name_or_path", "tiny", "--dataset_name", "pairs.jsonl", "--max_completion_length", 12)
    return doctor(place, *given, "--num_generations", 4, "--ddp_timeout", 120, launch=launch, fault=fault)


@pytest.mark.parametrize(("fault", "failing"), FAULTS)
def test_over_two_ranks(place: Path, fault: str, failing: set[str]) -> None:
    """Only the first rank prints, and it names the planted fault."""
    done, found = over_two_ranks(place, fault)
    assert found, done.stdout + done.stderr
    assert done.returncode != 0 and "label mass" in done.stderr, "a drawn model gives no labels"
    assert found.keys() >= RANKS and {name for name, status in found.items() if status == "fail"} >= failing, found
    if not fault:
        assert all(found[name] == "pass" for name in RANKS), found
        assert done.stdout.count("chat template") == 1


def test_the_rank_with_the_least_memory_decides(place: Path) -> None:
    done, found = over_two_ranks(place, "memory")
    assert found["memory"] == "fail" and re.search(r"fail  memory +rank 1: .* of 1e-05 GiB are free", done.stdout)
    assert "failed: memory" in done.stderr, done.stderr


@pytest.mark.parametrize("what", ["tokenizer", "rows"])
def test_a_file_that_one_rank_lacks_is_a_finding_on_both(place: Path, what: str) -> None:
    done, found = over_two_ranks(place, what)
    assert found and found[what] == "fail", done.stdout + done.stderr
    assert re.search(rf"fail  {what} +rank 1: planted: the file is not here", done.stdout), done.stdout
    assert f"failed: {what}." in done.stderr and "weights" not in found, done.stderr


def test_a_rank_that_cannot_load_the_model_ends_all_and_says_why(place: Path) -> None:
    """The other rank waits for it in the first collective of loading."""
    started = time.monotonic()
    done, found = over_two_ranks(place, "model")
    assert done.returncode != 0 and found is None and time.monotonic() - started < 250
    assert "error: planted: the file is not here" in done.stderr, done.stderr
