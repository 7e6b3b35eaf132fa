"""recipes/machines/slurm.sh with substitutes for Slurm's two commands, which start everything on this machine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny import tiny_folder, tiny_pairs

from bench.processes import free_port
from dwrl_fast.config import parse_train
from dwrl_fast.training.runlog import read_metrics

SCRIPT = ROOT / "recipes" / "machines" / "slurm.sh"
# Runs the command after the options once per node, and fails if one of these fails.
SRUN = """#!/bin/bash
nodes=1
while [[ $1 == --* ]]; do
    if [[ $1 == --nodes ]]; then nodes=$2; fi
    shift 2
done
for ((i = 0; i < nodes; i++)); do "$@" & done
for job in $(jobs -p); do wait "$job" || exit 1; done
"""
SCONTROL = """#!/bin/bash
tr , '\\n' <<<"${@: -1}"
"""
RECORDS = """#!/bin/bash
printf '%s\\n' "$*" >>"$LOG"
"""


def job(folder: Path, hosts: str, *arguments: object, **environment: str) -> Any:
    """Run the script on these hosts until it ends."""
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("records", RECORDS)):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    given = {
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": hosts, "SLURM_JOB_ID": "7",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    run = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(run, env=os.environ | given | environment, capture_output=True, text=True, timeout=300)


def test_what_it_starts(tmp_path: Path) -> None:
    """Two machines train and a third serves. Training accepts the options, which include the server's address."""
    log = tmp_path / "log"
    given = {"PYTHON": "records", "LOG": str(log), "VLLM_NODES": "1", "MODEL": "m", "GPUS_PER_NODE": "4"}
    done = job(tmp_path, "a,b,c", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", **given)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    (server,) = [line for line in lines if "vllm" in line.split()[1]]
    assert "--host c" in server and "--tensor-parallel-size 4" in server
    trainers = [line for line in lines if line != server]
    assert len(trainers) == 2 and trainers[0] == trainers[1]
    launch, _, options = trainers[0].partition(" -m dwrl_fast.train ")
    assert "--nnodes 2 --nproc-per-node 4" in launch and "--rdzv-endpoint a:29500" in launch
    config = parse_train(options.split())
    assert config.hsdp and config.vllm_server_base_url == ("http://c:8000",) and config.vllm_mode == "server"
    assert config.resume_from_checkpoint == "auto"


def test_a_job_without_a_machine_to_train_on(tmp_path: Path) -> None:
    done = job(tmp_path, "a", VLLM_NODES="1", PYTHON="records", LOG=str(tmp_path / "log"))
    assert done.returncode == 2 and "no machine to train on" in done.stderr


@pytest.mark.slow
def test_it_trains_over_two_agents(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "tiny")
    tiny_pairs(tmp_path / "pairs.jsonl", 8)
    port = free_port()
    given: dict[str, Any] = {"model_name_or_path": tmp_path / "tiny", "dataset_name": tmp_path / "pairs.jsonl"}
    given |= {"output_dir": tmp_path / "run", "rollout_batch_size": 8, "minibatch_size": 4, "max_steps": 1}
    given |= {"max_completion_length": 6, "num_generations": 3}
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    done = job(tmp_path, "127.0.0.1,127.0.0.2", *options, PYTHON=sys.executable, GPUS_PER_NODE="2", PORT=str(port))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 x cpu" in done.stdout and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
