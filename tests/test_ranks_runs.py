"""Whole runs under torchrun: resumed with other numbers of ranks, killed, failing, interrupted."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_trackers import tensorboard_told
from tiny import tiny_folder, tiny_pairs

from dwrl_fast import embedded
from dwrl_fast.compute import one_thread
from dwrl_fast.training.runlog import read_metrics

pytestmark = pytest.mark.slow
MOST = 120  # tokens of a micro-batch: half a minibatch has more, a group has fewer
AUTO = ("--resume_from_checkpoint", "auto")
DRILL = Path(__file__).with_name("rank_drill.py")


def run(folder: Path, name: str, ranks: int, *options: str, fault: str = "none:0:0", restarts: int = 0) -> Any:
    """The finished process and the folder of the run. 0 ranks: without torchrun. Every step saves a checkpoint."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launch += [f"--max-restarts={restarts}", str(DRILL)]
    given: dict[str, Any] = {
        "model_name_or_path": folder / "tiny",
        "dataset_name": folder / "pairs.jsonl",
        "eval_dataset_name": folder / "held_out.jsonl",
        "output_dir": folder / name,
    } | {"rollout_batch_size": 8, "minibatch_size": 4, "max_steps": 4, "save_steps": 1, "save_total_limit": 9}
    given |= {"max_completion_length": 6, "num_generations": 3, "learning_rate": 1e-3}
    command = launch if ranks else ["-m", "dwrl_fast.train"]
    command += [part for option, value in given.items() for part in (f"--{option}", str(value))]
    return started([*command, *options], fault), folder / name


def started(arguments: list[str], fault: str = "none:0:0") -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments until it ends."""
    environment = os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DRILL.parent.parent)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_folder(folder / "tiny")
    tiny_pairs(folder / "pairs.jsonl", 24)
    tiny_pairs(folder / "held_out.jsonl", 6, 1)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[int, Path]:
    """Uninterrupted runs on one process and on two ranks."""
    found = {}
    for ranks in (0, 2):
        done, found[ranks] = run(folder, f"whole-{ranks}", ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    return found


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_two_ranks_do_what_one_process_does(whole: dict[int, Path]) -> None:
    one, two = (read_metrics(whole[ranks] / "metrics.jsonl") for ranks in (0, 2))
    exact = ("thought_tokens", "trained_tokens")
    for a, b in zip(one, two, strict=True):
        assert a.keys() - {k for k in a if "share_" in k} == b.keys() - {k for k in b if "share_" in k}
        assert all(a[k] == b[k] for k in exact), (a, b)
        assert all(abs(a[k] - b[k]) < 1e-5 for k in ("loss", "thought_loss", "grad_norm_score", "grad_norm_thought"))
    results = [json.loads((whole[ranks] / "result.json").read_text()) for ranks in (0, 2)]
    assert results[0]["accuracy_after"] == results[1]["accuracy_after"]
    for step in (1, 4):
        lines = [(whole[ranks] / "thoughts" / f"step-{step:06d}.jsonl").read_text().splitlines() for ranks in (0, 2)]
        pairs = [(json.loads(a), json.loads(b)) for a, b in zip(*lines, strict=True)]
        assert all(a["thought"] == b["thought"] and abs(a["score"] - b["score"]) < 1e-4 for a, b in pairs)


@pytest.mark.parametrize(("of", "on"), [(2, 0), (2, 1), (2, 4), (2, 2), (0, 2)])
def test_a_checkpoint_is_resumed_on_other_numbers_of_ranks(
    folder: Path, whole: dict[int, Path], of: int, on: int
) -> None:
    name = f"from-{of}-on-{on}"
    shutil.copytree(whole[of] / "checkpoint-000002", folder / name / "checkpoint-000002")
    done, there = run(folder, name, on, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stdout + done.stderr
    expected, found = read_metrics(whole[of] / "metrics.jsonl")[2:], read_metrics(there / "metrics.jsonl")
    assert [row["step"] for row in found] == [3, 4]
    for a, b in zip(expected, found, strict=True):
        assert all(abs(a[k] - b[k]) < 1e-5 for k in ("loss", "thought_loss"))
    assert (weights(there) == weights(whole[of])) >= (of == on)


def test_a_killed_rank_and_a_restart_lead_to_the_same_weights(folder: Path, whole: dict[int, Path]) -> None:
    done, there = run(folder, "killed", 2, *AUTO, fault="kill:1:2", restarts=1)
    assert done.returncode == 0 and "fault at step 2" in done.stdout, done.stdout + done.stderr
    assert "at step 2 of 4" in " ".join(done.stdout.split())
    said = ("lost the connection to another rank", "(exitcode: -9)")  # by the other rank, or by torchrun if it is first
    assert any(each in done.stderr for each in said), done.stderr
    assert weights(there) == weights(whole[2])


def test_kills_at_random_moments(folder: Path, whole: dict[int, Path]) -> None:
    """Kills either rank during sampling, updates or saving. The message of a failure has the moment."""
    for rank in (0, 1):
        moment = random.randrange(200)  # ms; four steps take about 600 ms here
        done, there = run(folder, f"later-{rank}", 2, *AUTO, fault=f"later:{rank}:{moment}", restarts=1)
        assert done.returncode == 0 and "fault at step" in done.stdout, f"{moment} ms\n{done.stdout}{done.stderr}"
        assert weights(there) == weights(whole[2]), f"{moment} ms"


def test_a_rank_that_raises_stops_all_and_alone_says_why(folder: Path) -> None:
    started = time.monotonic()
    done, _ = run(folder, "raised", 2, fault="raise:1:1")
    assert done.returncode == 1 and time.monotonic() - started < 250
    first = done.stderr.index("Traceback")
    assert done.stderr[:first].strip().splitlines()[-1] == "rank 1 failed, and the other ranks stop with it:"
    assert "a planted fault" in done.stderr[first:].split("Traceback")[1]
    assert "lost the connection" not in done.stderr


def test_an_interrupted_rank_leaves_a_run_that_goes_on(folder: Path, whole: dict[int, Path]) -> None:
    done, there = run(folder, "interrupted", 2, fault="interrupt:1:3")
    assert done.returncode != 0 and "interrupted" in done.stderr and not (there / "model").exists()
    done, _ = run(folder, "interrupted", 2, *AUTO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights(there) == weights(whole[2])


@pytest.mark.parametrize("kind", ["loss", "sampler"])
def test_nan_on_one_rank_is_skipped_by_both(folder: Path, whole: dict[int, Path], kind: str) -> None:
    """The NaN is in a loss or in a rank's samples. The weights from which the ranks sample stay equal on both."""
    done, there = run(folder, f"nan-{kind}", 2, "--skip_bad_batches", "1", fault=f"{kind}:1:2")
    assert done.returncode == 0 and "fault at step 2" in done.stdout, done.stdout + done.stderr
    said = re.findall(r"step (\d) rank (\d): (skipped \d, [0-9a-f]{32})", done.stdout)
    of_rank = {rank: {step: rest for step, who, rest in said if who == rank} for rank in "01"}
    assert of_rank["0"] == of_rank["1"] and len(of_rank["0"]) == 4
    assert [rest.split(",")[0] for _, rest in sorted(of_rank["1"].items())] == [f"skipped {n}" for n in (0, 0, 1, 1)]
    rows = read_metrics(there / "metrics.jsonl")
    assert [row.get("skipped_batches") for row in rows] == [None, None, 1, 1]
    (file,) = (there / "bad_batches").iterdir()
    assert file.name == {"loss": "step-000003-score-0001.json", "sampler": "step-000003-rollout.json"}[kind]
    assert weights(there) != weights(whole[2]), "an update is missing"
    assert ("loss" in rows[2]) == (kind == "loss") and all(row["loss"] < 100 for row in rows if "loss" in row)


def test_a_rank_without_memory_ends_all_and_names_a_budget_that_suffices(folder: Path) -> None:
    done, there = run(folder, "memory", 2, fault=f"memory:1:{MOST}")
    assert done.returncode != 0 and "fault at" in done.stdout, done.stdout + done.stderr
    said = re.search(
        r"\nerror: out of memory in a micro-batch of (\d+) tokens on rank 1: give --token_budget (\d+) or less",
        done.stderr,
    )
    assert said is not None and done.stderr.count("\nerror: ") == 1, done.stderr
    assert int(said[1]) > MOST >= int(said[2]) and not (there / "model").exists()
    done, there = run(folder, "memory-again", 2, "--token_budget", said[2], fault=f"memory:1:{MOST}")
    assert done.returncode == 0 and "fault at" not in done.stdout, done.stdout + done.stderr
    assert (there / "model").exists()


def test_the_embedded_task_draws_the_same_thoughts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its first rollout batch, on one process, two ranks and four. Rounding may change one thought in a hundred."""
    with one_thread():
        made = embedded.prepare(folder / "embedded", 0, sizes=embedded.Sizes(512, 8, 8))
    own = ("--config", str(embedded.recipe("btpo")), "--max_steps", "1", "--dataset_name", str(made.train))
    lines = {}
    for ranks in (0, 2, 4):
        name = f"first-batch-{ranks}"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
        model = ("--model_name_or_path", str(made.model), "--output_dir", str(folder / name))
        done = started([*launch, "-m", "dwrl_fast.train", *own, *model])
        assert done.returncode == 0, done.stdout + done.stderr
        lines[ranks] = (folder / name / "thoughts" / "step-000001.jsonl").read_text().splitlines()
    for ranks in (2, 4):
        pairs = [(json.loads(a), json.loads(b)) for a, b in zip(lines[0], lines[ranks], strict=True)]
        share = sum(a["thought"] != b["thought"] for a, b in pairs) / len(pairs)
        with capsys.disabled():
            print(f"\n{ranks} ranks: {share:.2%} of {len(pairs)} thoughts differ")
        assert share <= 0.01


def test_an_error_of_the_user_is_said_once(folder: Path) -> None:
    done, _ = run(folder, "wrong", 2, "--max_length", "3")
    assert done.returncode != 0 and done.stderr.count("\nerror: ") == 1, done.stderr


def test_only_the_first_rank_tells_trackers(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    done, path = run(folder, "tracked", 2, "--report_to", "tensorboard")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((path / "tensorboard").glob("events.*"))) == 1
    assert [(step, value) for step, value in tensorboard_told(path)["train/loss"]] == [
        (row["step"], pytest.approx(row["loss"])) for row in read_metrics(path / "metrics.jsonl")
    ]
