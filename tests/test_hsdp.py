"""Two torchrun agents on this machine, each acting as a separate machine: a whole model on each, over loopback."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny import tiny_folder, tiny_pairs

from bench.processes import free_port
from dwrl_fast.config import parse_train
from dwrl_fast.errors import ConfigError
from dwrl_fast.ranks import mesh_of
from dwrl_fast.training.runlog import read_metrics

DRILL = Path(__file__).with_name("hsdp_drill.py")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip


def agents(*arguments: object, each: int = 2) -> None:
    """Run two torchrun agents, which start `each` processes of a program, until they end."""
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={each}"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    started = [
        subprocess.Popen(
            [*launch, f"--node-rank={node}", *map(str, arguments)],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=400)[0] for agent in started]
    finally:
        for agent in started:
            agent.kill()
    assert [agent.returncode for agent in started] == [0, 0], "\n\n".join(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hsdp")
    tiny_folder(folder / "tiny")
    tiny_pairs(folder / "pairs.jsonl", 11)
    return folder


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two tensors of the same name, relative to the norm of the first."""
    assert one.keys() == other.keys()
    return max(float((other[name] - x).norm() / x.norm().clamp_min(1e-30)) for name, x in one.items())


@pytest.mark.slow
def test_gradients_and_weights_are_those_without_it(folder: Path) -> None:
    """Four ranks, two on each agent, in float32 and float64, as in tests/test_ranks.py."""
    for how in ("line", "hsdp"):
        agents(DRILL, folder, how)
    files = {how: [folder / f"{how}-{rank}.pkl" for rank in range(4)] for how in ("line", "hsdp")}
    found = {how: [pickle.loads(file.read_bytes()) for file in some] for how, some in files.items()}
    assert {(each["mesh"], each["parts"]) for each in found["line"]} == {((4,), 4)}
    assert {(each["mesh"], each["parts"]) for each in found["hsdp"]} == {((2, 2), 2)}
    for kind, bound in (("float32", 1e-5), ("float64", 1e-9)):
        for line, hsdp in zip(found["line"], found["hsdp"], strict=True):
            for name, expected in line["updates"][kind].items():
                got = hsdp["updates"][kind][name]
                for phase, gradients in expected["gradients"].items():
                    assert sum(x.norm() for x in gradients.values()) > 0
                    assert apart(gradients, got["gradients"][phase]) < bound, (kind, name, phase)
                assert len(expected["scores"]) == len(got["scores"])
                if kind == "float64" and "weights" in expected:
                    assert apart(expected["weights"], got["weights"]) < bound, name


@pytest.mark.slow
def test_a_run_saves_and_goes_on_with_or_without_it(folder: Path) -> None:
    """A checkpoint of a run with --hsdp can be resumed with it and without it."""
    given: dict[str, Any] = {"model_name_or_path": folder / "tiny", "dataset_name": folder / "pairs.jsonl"}
    given |= {"rollout_batch_size": 8, "minibatch_size": 4, "max_steps": 2, "save_steps": 1, "save_total_limit": 9}
    given |= {"max_completion_length": 6, "num_generations": 3, "learning_rate": 1e-3, "dtype": "fp32"}
    command = ["-m", "dwrl_fast.train", *(part for name, value in given.items() for part in (f"--{name}", value))]
    agents(*command, "--output_dir", folder / "whole", "--hsdp")
    for name, how in (("on-hsdp", ["--hsdp"]), ("on-line", [])):
        shutil.copytree(folder / "whole" / "checkpoint-000001", folder / name / "checkpoint-000001")
        agents(*command, "--output_dir", folder / name, "--resume_from_checkpoint", "latest", *how)
        (second,) = read_metrics(folder / name / "metrics.jsonl")
        assert abs(second["loss"] - read_metrics(folder / "whole" / "metrics.jsonl")[1]["loss"]) < 1e-5
    one, other = ((folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "on-hsdp"))
    assert one == other


@pytest.mark.parametrize(("count", "beside"), [(4, 4), (5, 2)])
def test_it_is_refused_on_one_machine_and_on_unequal_ones(count: int, beside: int) -> None:
    with pytest.raises(ConfigError, match=r"--hsdp: .* leave it out on one"):
        mesh_of("cpu", count, beside)


def test_the_option_says_what_it_needs() -> None:
    config = parse_train(["--hsdp", "--model_name_or_path", "m", "--dataset_name", "d"])
    assert config.hsdp and config.explicit >= {"hsdp"}
