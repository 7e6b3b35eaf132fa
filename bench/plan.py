"""Compares predictions of `dwrl_fast.plan` with the same steps on this machine.

    python -m bench.plan

The profile is measured before every setting, as with `dwrl_fast.doctor --profile`. Then models with random weights run
whole steps (sampling and both updates) in this process, on artificial groups with the planned lengths; no thought ends
early. On a CPU everything runs on one thread, in float32, and is timed in CPU time of this process, so other load on
the machine matters less.

On a GPU the steps run in bfloat16 and are timed in wall time. There the predicted memory is also compared with the peak
that PyTorch's allocator reports, for which the plan's reserve is left out.
"""

import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import command
from bench.machine import machine
from bench.training.step import COMMON, MODELS, QWEN_7B
from dwrl_fast.compute import GIB, Compute
from dwrl_fast.dialog import Dialog, Template
from dwrl_fast.doctor.profile import measured
from dwrl_fast.embedded.arrays import EVALUATE, RATE
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import Group
from dwrl_fast.methods import METHODS
from dwrl_fast.plan import PlanConfig, Profile, planned
from dwrl_fast.plan.lengths import groups
from dwrl_fast.plan.memory import memory
from dwrl_fast.plan.seconds import step
from dwrl_fast.plan.trace import trace
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.scoring import PolicyJudging
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.policy import Policy, load_judging

SMOLLM2 = COMMON | {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
# The model, then options of training and of the plan.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dwrl, 8 layers of 512": (MODELS["trunk-heavy"], {"method": "dwrl", "rollout_batch_size": 2, "minibatch_size": 1}),
    "dwrl, SmolLM2-135M's shape": (SMOLLM2, {"method": "dwrl", "rollout_batch_size": 1, "minibatch_size": 1}),
    "bt, 8 layers of 512, checkpointing": (
        MODELS["trunk-heavy"],
        {"method": "bt", "gradient_checkpointing": True, "rollout_batch_size": 16, "minibatch_size": 8},
    ),
}
# On a GPU further models, of which several layers fit next to their optimizer states.
LARGE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dwrl, 4 layers of Qwen2.5-7B": (
        QWEN_7B | {"num_hidden_layers": 4},
        {"method": "dwrl", "rollout_batch_size": 16, "minibatch_size": 8, "gradient_checkpointing": True},
    ),
    "dwrl, 8 layers of Qwen2.5-7B, LoRA": (
        QWEN_7B | {"num_hidden_layers": 8},
        {"method": "dwrl", "rollout_batch_size": 16, "minibatch_size": 8, "use_peft": True},
    ),
}
LENGTHS = {"prompt_tokens": 96, "response_tokens": 64, "thought_tokens": 24}
ASKED = 0.25
CUDA = torch.cuda.is_available()
DTYPE: Any = "bf16" if CUDA else "fp32"


def now() -> float:
    """Seconds: of wall time on a GPU after all its work, otherwise of this process's CPU time."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def configured(model: dict[str, Any], options: dict[str, Any], folder: Path) -> PlanConfig:
    """The plan's options for one process on this machine."""
    path = folder / "config.json"
    path.write_text(json.dumps(model))
    rest = {"max_completion_length": LENGTHS["thought_tokens"], "gpus": 1, "reserve_gib": 0.0, "learning_rate": 1e-9}
    return PlanConfig(
        model_config=str(path), dataset_name="", tokenizer_name_or_path="", dtype=DTYPE, **LENGTHS | rest | options
    )


def predicted(config: PlanConfig, profile: Profile) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The predicted seconds of a step by stage, and the bytes at every moment by kind."""
    setup = planned(config, config.lengths, profile)
    traced = trace(setup, 1)
    seconds = step(setup, traced, 1, 1, config.token_budget)
    return seconds, memory(setup, traced, 1, config.token_budget).moments


def policy_of(config: PlanConfig, ranks: Ranks = ALONE) -> tuple[Policy, Any, list[Group]]:
    """A policy with the planned model, its method, and the groups of a rollout batch with the planned lengths."""
    dialog = Dialog(make_tokenizer(), Template(EVALUATE, RATE))
    method: Any = METHODS[config.method](config, dialog)
    judging = load_judging(config, method, dialog, Compute.resolve(config.dtype), ranks)
    model = judging.runtime.model.train()
    if config.gradient_checkpointing:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(judging.runtime, Optimizers(model, method, config, total=1))
    made = groups(config.lengths, method, config.rollout_batch_size, model.lm.config.vocab_size)
    if method.old_policy == "start":
        assert isinstance(judging, PolicyJudging)
        made = judging.with_start_logprobs(made)
    elif method.old_policy is not None:
        fresh = judging.runtime.logprobs(made, method.trained_temperature)
        made = [group.with_logprobs(each) for group, each in zip(made, fresh, strict=True)]
    return policy, method, made


def timed(config: PlanConfig, repeats: int) -> dict[str, float]:
    """The measured seconds of real steps: the median of `repeats`, after one warm-up."""
    policy, method, made = policy_of(config)
    found: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        seconds: dict[str, float] = {}
        if method.thoughts_each:
            seconds["sampling"] = _sampling(policy.runtime.sampler, made, config)
        for minibatch in policy.pack(made, config.minibatch_size):
            for phase in method.phases:
                started = now()
                policy.update(phase, minibatch, method.loss, 0)
                seconds[phase] = seconds.get(phase, 0.0) + now() - started
        found.append(seconds)
    return {stage: statistics.median(each[stage] for each in found[1:]) for stage in found[0]}


def _sampling(sampler: Any, made: list[Group], config: PlanConfig) -> float:
    """Seconds of sampling thoughts about the responses of `made`."""
    sampler.stop_ids = frozenset()  # every thought has its full length
    some = [group.sequences[k][0] for group in made for k in range(2)]
    asked = [one.ids[: one.thought.start] for one in some]
    started = now()
    thoughts = sampler.sample(
        asked, config.num_generations, max_tokens=config.max_completion_length, temperature=1.0, seed=0
    )
    taken = now() - started
    assert all(len(thought.ids) == config.max_completion_length for each in thoughts for thought in each)
    return taken


def main() -> None:
    """The command."""
    parser = command.parser("plan", __doc__)
    settings = SETTINGS | (LARGE if CUDA else {})
    parser.add_argument("--only", nargs="+", default=list(settings), choices=list(settings), metavar="SETTING")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed, after one (default 3)")
    parser.add_argument("--quick", action="store_true", help="the first setting, once")
    parser.add_argument("--json", type=Path, help="write machine, versions, commit and figures to this file")
    args = parser.parse_args()
    if args.quick:
        args.only, args.repeats = args.only[:1], 1
    console = Console(width=120)
    torch.set_num_threads(1)
    cases: dict[str, Any] = {}
    for name in args.only:
        model, options = settings[name]
        profile = measured(Compute.resolve(DTYPE), ALONE, now)
        with tempfile.TemporaryDirectory() as folder:
            config = configured(model, options, Path(folder))
            seconds, moments = predicted(config, profile)
            gc.collect()
            before = _begin()
            cases[name] = {"predicted": seconds, "measured": timed(config, args.repeats), "profile": profile.to_yaml()}
            cases[name]["predicted_bytes"] = moments
            if CUDA:
                cases[name]["measured_bytes"] = torch.cuda.max_memory_allocated() - before
        show(name, cases[name], console)
    if args.json:
        content = {"benchmark": "plan", "machine": machine(), "cases": cases}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def _begin() -> int:
    """Start a measurement of peak memory. Returns the bytes that are in use already; 0 without a GPU."""
    if not CUDA:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def show(name: str, case: dict[str, Any], console: Console) -> None:
    """Print a table of one setting, by stage and in total."""
    said, real = case["predicted"], case["measured"]
    rows = [(f"{stage}, s", said[stage], real[stage]) for stage in real]
    rows.append(("step, s", sum(said.values()), sum(real.values())))
    if "measured_bytes" in case:
        peak = max(sum(kinds.values()) for kinds in case["predicted_bytes"].values())
        rows.append(("peak memory, GiB", peak / GIB, case["measured_bytes"] / GIB))
    lines = [(what, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}") for what, a, b in rows]
    heads = ("", "predicted", "measured", f"ratio (target {1 - ASKED} to {1 + ASKED})")
    console.print(command.table(name, heads, lines))


if __name__ == "__main__":
    main()
