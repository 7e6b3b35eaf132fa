"""The plan: its arithmetic against the trace, the trace against the profiler of real updates, and the command."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from plan_cases import peak
from rich.console import Console

from bench.processes import together
from dwrl_fast import compute
from dwrl_fast.compute import Compute
from dwrl_fast.config import parse_train
from dwrl_fast.doctor import profile
from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.plan import PlanConfig, Setup, load_profile, parse_plan, planned
from dwrl_fast.plan.lengths import Lengths
from dwrl_fast.plan.memory import largest_budget, memory, parts
from dwrl_fast.plan.profile import Profile
from dwrl_fast.plan.seconds import step
from dwrl_fast.plan.short import short
from dwrl_fast.plan.sizing import changes, room, sized, sizes, traced_on
from dwrl_fast.plan.trace import trace
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.training.dry_run import dry_run
from dwrl_fast.training.policy import load_judging

CPU = Profile("CPU", "made up", "cpu", 16.0, {1: 5e10}, 1e10, 1e10, 1e9, 1e9, overlaps=False)
LLAMA = {
    "model_type": "llama", "vocab_size": 8003, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False, "vocab_size": 3001},
    "deep": LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12, "vocab_size": 1009},
}
# A minibatch has 4 groups, so each of two ranks has two. With a small budget these are two micro-batches.
CASES: dict[str, dict[str, Any]] = {
    "dwrl": {"model": "llama"},
    "dwrl, untied, two micro-batches": {"model": "qwen2", "token_budget": 100},
    "dwrl, checkpointing": {"model": "deep", "gradient_checkpointing": True},
    "bt": {"model": "deep", "method": "bt"},
    "dpo": {"model": "qwen2", "method": "dpo"},
    "dwrl, LoRA": {"model": "llama", "use_peft": True},
}
PAPERS = {"qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "llama3.2-3b": 3_212_749_824,
          "llama3.1-8b": 8_030_261_248}  # fmt: skip


def config_of(folder: Path, model: str = "llama", **changes: Any) -> PlanConfig:
    path = folder / f"{model}.json"
    path.write_text(json.dumps(MODELS[model]))
    values: dict[str, Any] = {"prompt_tokens": 120, "response_tokens": 60, "thought_tokens": 40}
    values |= {"minibatch_size": 4, "rollout_batch_size": 4, "dtype": "fp32", "tokenizer_name_or_path": ""}
    values |= {"gpus": 2, "gpu_memory": 16.0, "reserve_gib": 0.0, "dataset_name": "", "model_config": str(path)}
    return PlanConfig(**values | changes)


def setup_of(config: PlanConfig, device: Profile = CPU) -> Setup:
    return planned(config, config.lengths, device)


@pytest.mark.parametrize(("name", "gpus"), [*((name, 2) for name in CASES), ("dwrl", 1), ("dwrl, LoRA", 1), ("bt", 8)])
def test_arithmetic_is_the_trace(tmp_path: Path, name: str, gpus: int) -> None:
    """For a micro-batch as large as the traced one, the arithmetic gives the memory that FSDP2 and autograd hold in the
    trace: for the weights, and for the largest sum.
    """
    setup = setup_of(config_of(tmp_path, **CASES[name]))
    tokens = trace(setup, 1).large.tokens
    lying = parts(setup, gpus, tokens, tokens / 3)
    traced = trace(setup, gpus, accumulates=lying.accumulates)
    found = memory(setup, traced, gpus, tokens, full=True)
    most = traced.large.most
    beside = ("optimizer", "whole copy", "frozen model")  # not part of a pass
    sums = {
        moment: sum(size for kind, size in kinds.items() if kind not in beside)
        for moment, kinds in found.moments.items()
        if moment != "sampling"
    }
    assert most["weights"] == pytest.approx(found.moments["loss"]["weights"], rel=0.05)
    assert most.total() == pytest.approx(max(sums.values()), rel=0.1), (sums, most)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_profiler_of_a_real_update_on_two_ranks(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, **CASES[name])
    measured = max(together(tmp_path, 2, peak, config, tmp_path))
    setup = setup_of(config)
    found = memory(setup, trace(setup, 2), 2, config.token_budget)
    moment = max((each for each in found.moments if each != "sampling"), key=found.sum)
    ratio = found.sum(moment) / measured
    with capsys.disabled():
        kinds = {kind: round(size / 2**20, 1) for kind, size in found.moments[moment].items()}
        print(f"\n{name}: planned {found.sum(moment) / 2**20:.1f} MiB, profiler {measured / 2**20:.1f}: {ratio:.3f}")
        print(f"  {moment}: {kinds}")
    assert ratio == pytest.approx(1, abs=0.1)


def test_the_shapes_of_the_papers_have_the_published_sizes() -> None:
    for name, parameters in PAPERS.items():
        config = parse_plan(["--model_config", str(ROOT / "recipes" / "models" / f"{name}.json")])
        assert planned(config, config.lengths, load_profile("h100")).shape.parameters == parameters


@pytest.mark.slow
def test_a_7b_on_eight_ranks_by_hand() -> None:
    """Every kind of memory, in bytes, compared with a calculation by hand."""
    path = ROOT / "recipes" / "models" / "qwen2.5-7b.json"
    config = parse_plan(["--model_config", str(path), "--gradient_checkpointing"])
    setup = planned(config, config.lengths, load_profile("h100"))
    traced = traced_on(setup, 8)
    parameters, root, layer = PAPERS["qwen2.5-7b"], 2 * 152064 * 3584 + 3584, 233_057_792
    found = memory(setup, traced, 8, config.token_budget).moments
    kept = found["loss"]
    assert kept["weights"] == found["end"]["gradients"] == pytest.approx(4 * parameters / 8, rel=0.01)
    assert kept["optimizer"] == pytest.approx(8 * parameters / 8, rel=0.01)
    assert kept["whole copy"] == 2 * parameters
    assert kept["gathered weights"] == 2 * root
    assert found["layers"]["collectives"] == pytest.approx(6 * layer, rel=0.01)
    assert found["end"]["collectives"] == pytest.approx(4 * root, rel=0.01)
    # With checkpointing, a layer keeps its input. The last norm keeps a float32 copy and its factor. The head keeps its
    # rows and computes their gradients.
    tokens = 4 * traced.small.tokens
    rows = tokens * traced.large.rows / traced.large.tokens
    assert kept["activations"] == pytest.approx(3584 * ((28 * 2 + 6) * tokens + 4 * rows), rel=0.03)
    for traced_kinds in (traced.small.loss, traced.large.loss):
        assert traced_kinds["weights"] == pytest.approx(4 * parameters / 8, rel=0.01)
        assert traced_kinds["gradients"] == pytest.approx(4 * parameters / 8, rel=0.01)
        assert traced_kinds["gathered weights"] == pytest.approx(2 * root, rel=0.1)


def test_what_grows_and_what_does_not(tmp_path: Path) -> None:
    setup = setup_of(config_of(tmp_path, gpus=4))
    traced = trace(setup, 4)
    room = memory(setup, traced, 4, 3000, full=True).peak
    budget = largest_budget(setup, traced, 4, room)
    assert budget <= 3000 < budget + 256
    assert largest_budget(setup, traced, 4, 1.0) == 0
    peaks = [each.memory.moments["layers"]["weights"] for each in sizes(setup, traced)]
    assert len(peaks) == 11 and peaks == sorted(peaks, reverse=True)
    seconds = [sum(each.seconds.values()) for each in sizes(setup, traced)]
    assert seconds[1] < seconds[0] and seconds[-1] >= 0.9 * seconds[3], "4 groups do not scale past 4 ranks"


def test_a_machine_holds_a_whole_model_under_hsdp(tmp_path: Path) -> None:
    config = config_of(tmp_path, gpus=8, gpus_per_machine=2, hsdp=True)
    setup = setup_of(config)
    traced = traced_on(setup, 8)
    line = trace(setup_of(config_of(tmp_path, gpus=2)), 2)
    assert traced.large.most["weights"] == line.large.most["weights"]
    assert sized(setup, traced, 8).memory.moments["loss"]["weights"] == pytest.approx(
        sized(setup_of(config_of(tmp_path, gpus=2)), line, 2).memory.moments["loss"]["weights"]
    )
    with pytest.raises(ConfigError, match="several machines"):
        config_of(tmp_path, gpus=8, gpus_per_machine=8, hsdp=True)


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"use_peft": True, "load_in_4bit": True}, 8, "4 bits are not sharded.* --gpus 1 is one process"),
    ({"cpu_offload": True}, 1, "cpu_offload needs GPUs and processes started by torchrun"),
    ({"cpu_offload": True, "profile": "CPU"}, 8, "cpu_offload needs GPUs"),
    ({"cpu_offload": True, "use_liger_kernel": True}, 8, "Leave one out"),
    ({"hsdp": True, "gpus_per_machine": 3}, 8, "a multiple of --gpus_per_machine"),
]


@pytest.mark.parametrize(("options", "gpus", "said"), REFUSED)
def test_what_training_refuses_is_refused(tmp_path: Path, options: dict[str, Any], gpus: int, said: str) -> None:
    if "profile" in options:
        options = options | {"profile": str(tmp_path / "cpu.yaml")}
        (tmp_path / "cpu.yaml").write_text(CPU.to_yaml())
    with pytest.raises(ConfigError, match=f"gpus = {gpus}: .*{said}"):
        config_of(tmp_path, gpus=gpus, **options)


@pytest.mark.parametrize(
    ("options", "gpus", "expected"),
    [
        ({"use_peft": True, "load_in_4bit": True}, 1, [1]),
        ({"cpu_offload": True}, 2, [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]),
        ({"hsdp": True, "gpus_per_machine": 6}, 12, [12, 24, 48, 96, 192, 384, 768]),
    ],
)
def test_only_accepted_sizes_are_shown_and_suggested(
    tmp_path: Path, options: dict[str, Any], gpus: int, expected: list[int]
) -> None:
    """A size that training refuses is neither in the table nor suggested."""
    setup = setup_of(config_of(tmp_path, gpus=gpus, **options), load_profile("h100"))
    traced = traced_on(setup, gpus)
    assert [each.gpus for each in sizes(setup, traced)] == expected
    suggested = [int(line.split()[0]) for line in changes(setup, traced, gpus) if line.split()[1] == "GPUs:"]
    assert suggested == expected[1:2], "the next accepted size"


def test_training_refuses_what_the_plan_refuses(tmp_path: Path) -> None:
    config, dialog = config_of(tmp_path, gpus=2, cpu_offload=True), SimpleNamespace(pad_id=0)
    with pytest.raises(ConfigError, match="cpu_offload needs GPUs"):
        load_judging(config, SimpleNamespace(), dialog, Compute(torch.device("cuda"), torch.float32))  # type: ignore
    config = config_of(tmp_path, gpus=1, use_peft=True, load_in_4bit=True)
    ranks = Ranks(0, 2, object())
    with pytest.raises(ConfigError, match="4 bits are not sharded"):
        load_judging(config, SimpleNamespace(), dialog, Compute.resolve("fp32"), ranks)  # type: ignore


def test_a_suggested_change_is_one_that_training_accepts(tmp_path: Path) -> None:
    """On CPUs, and with Liger's kernels, --cpu_offload is refused, so it is not suggested."""
    for device, liger in ((CPU, False), (load_profile("h100"), True)):
        setup = setup_of(config_of(tmp_path, gpu_memory=1e-3, use_liger_kernel=liger), device)
        assert not [line for line in changes(setup, traced_on(setup, 2), 2) if "cpu_offload" in line]


def test_the_share_of_vllm_is_of_the_given_memory(tmp_path: Path) -> None:
    setup = setup_of(config_of(tmp_path, gpu_memory=24.0, use_vllm=True), load_profile("h100"))
    found = memory(setup, trace(setup, 1), 1, 4096).moments["sampling"]
    assert found["vLLM"] == pytest.approx(0.3 * 24 * 2**30) and room(setup) == 24 * 2**30
    assert setup_of(config_of(tmp_path, gpu_memory=None), load_profile("h100")).capacity == 80


def test_a_step_has_the_stages_of_training(tmp_path: Path) -> None:
    setup = setup_of(config_of(tmp_path))
    traced = trace(setup, 2)
    assert set(step(setup, traced, 2, 2, 4096)) == {"sync", "sampling", "score", "thought"}
    setup = setup_of(config_of(tmp_path, dtype="bf16"))
    assert "old_logprobs" in step(setup, trace(setup, 2), 2, 2, 4096)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "not a device profile"),
        ("{name: x", "nor a profile file"),
        (CPU.to_yaml().replace("16.0", "16.0\nmuch: 1"), "much"),
        (CPU.to_yaml().replace("memory: 10000000000.0", "memory: -1.0"), "above 0"),
        (CPU.to_yaml().replace("operator: 0.0", "operator: -1.0"), "not negative"),
        (CPU.to_yaml().replace("attention: 10000000000.0", "attention: .nan"), "above 0"),
    ],
)
def test_a_profile_that_is_none_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_profile(str(tmp_path / "p.yaml"))
    with pytest.raises(ConfigError, match="h100, h200, a100, rtx4090"):
        load_profile("h1000")


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(CPU.to_yaml())
    assert load_profile(str(tmp_path / "p.yaml")) == CPU
    # YAML reads numbers with an exponent but no point as strings.
    written = CPU.to_yaml().replace("10000000000.0", "1e10").replace("1000000000.0", "1e9").replace(": 0.0", ": 0e0")
    written = written.replace("16.0", "16e0").replace("shares: {}", "shares: {link: 5e-1}")
    (tmp_path / "p.yaml").write_text(written)
    assert load_profile(str(tmp_path / "p.yaml")) == dataclasses.replace(CPU, shares={"link": 0.5})
    assert load_profile("h100").product_rate(4096) == pytest.approx(0.46 * 989e12)


def command(folder: Path, *arguments: object) -> Any:
    run = [sys.executable, "-m", "dwrl_fast.plan", *map(str, arguments)]
    return subprocess.run(run, cwd=folder, env=None, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "m.json"
    path.write_text(json.dumps(LLAMA))
    done = command(tmp_path, "--model_config", path, "--gpus", 2, "--price", 2, "--plot", "p.png", "--json", "p.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "p.json").read_text())
    assert [each["gpus"] for each in found["sizes"]] == [2, 1, *(2**i for i in range(2, 11))]
    assert (tmp_path / "p.png").stat().st_size > 10_000
    tight = command(tmp_path, "--model_config", path, "--gpus", 2, "--gpu_memory", 5.3)
    assert tight.returncode == 4 and "--token_budget" in tight.stdout and "does not fit" in tight.stderr, tight.stdout
    none = command(tmp_path, "--gpus", 2)
    assert none.returncode == 2 and "recipes/models" in none.stderr


def test_the_dtype_follows_the_device(tmp_path: Path) -> None:
    config = config_of(tmp_path, dtype="auto")
    assert setup_of(config).dtype == torch.float32
    assert setup_of(config, load_profile("h100")).dtype == torch.bfloat16


def test_this_machine_as_the_doctor_measures_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"SMALLEST": {"cpu": (8, 64)}, "WIDE": {"cpu": 128}, "NUMBERS": {"cpu": 1 << 12}}.items():
        monkeypatch.setattr(profile, name, value)
    found = profile.measured(Compute.resolve("fp32"), ALONE)
    assert set(found.products) == {8, 64} and not found.overlaps
    assert min(*found.products.values(), found.attention, found.memory, found.link, found.operator) > 0
    assert "not" not in profile.told(found, "p.yaml").status and "no link was measured" in found.source
    (tmp_path / "p.yaml").write_text(found.to_yaml())
    assert load_profile(str(tmp_path / "p.yaml")) == found


def test_a_dry_run_says_its_short_form(folder: Path) -> None:
    given = ("--model_name_or_path", f"{folder}/tiny", "--dataset_name", f"{folder}/pairs.jsonl")
    out = io.StringIO()
    dry_run(parse_train([*given, "--max_completion_length", "6"]), Console(file=out, width=200), Ranks(count=2))
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("memory")]
    assert "GiB on each of 2 ranks at the peak" in line and "activations" in line


def test_a_dry_run_respects_the_limit_of_a_container(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a CPU is that which the container allows, as for the doctor."""
    for name, text in {"memory.max": "1048576", "memory.current": "0", "memory.stat": "inactive_file 0"}.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(compute, "CGROUP", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ("--model_name_or_path", f"{folder}/tiny", "--dataset_name", f"{folder}/pairs.jsonl")
    said = short(parse_train(given), Lengths(20, 20, 20), 1)
    assert "of 0.000977 (" in said and "IT DOES NOT FIT" in said


def test_a_trace_without_compiled_operators_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(config_of(tmp_path))
    monkeypatch.setattr("dwrl_fast.ops.extension.problem", lambda: "build it: make install")
    with pytest.raises(ConfigError, match="make install"):
        trace(setup, 1)


def test_a_configuration_that_is_not_there_is_said() -> None:
    config = parse_plan(["--model_config", "nowhere.json"])
    with pytest.raises(ModelError, match=r"cannot load a model from 'nowhere.json'. There is no such file."):
        planned(config, config.lengths, load_profile("h100"))
