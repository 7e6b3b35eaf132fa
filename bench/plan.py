"""Compares predictions of `dwrl_fast.plan` with the same steps timed on this machine.

    python -m bench.plan

The profile is measured before every setting, as with `dwrl_fast.doctor --profile`. Then models with random weights run
whole steps (sampling and both updates) in this process, on artificial groups with the planned lengths; no thought ends
early. Everything runs on one thread and is timed in CPU time of this process, so other load on the machine matters
less.
"""

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
from bench.training.step import COMMON, MODELS
from dwrl_fast.compute import Compute
from dwrl_fast.dialog import Dialog, Template
from dwrl_fast.doctor.profile import measured
from dwrl_fast.embedded.arrays import EVALUATE, RATE
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import Group
from dwrl_fast.methods import METHODS
from dwrl_fast.plan import PlanConfig, Profile, planned
from dwrl_fast.plan.lengths import groups
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
LENGTHS = {"prompt_tokens": 96, "response_tokens": 64, "thought_tokens": 24}
ASKED = 0.25


def configured(model: dict[str, Any], options: dict[str, Any], folder: Path) -> PlanConfig:
    """The plan's options for one process on this machine."""
    path = folder / "config.json"
    path.write_text(json.dumps(model))
    rest = {"max_completion_length": LENGTHS["thought_tokens"], "gpus": 1, "reserve_gib": 0.0, "learning_rate": 1e-9}
    return PlanConfig(
        model_config=str(path), dataset_name="", tokenizer_name_or_path="", dtype="fp32", **LENGTHS | rest | options
    )


def predicted(config: PlanConfig, profile: Profile) -> dict[str, float]:
    """The predicted seconds of a step by stage."""
    setup = planned(config, config.lengths, profile)
    return step(setup, trace(setup, 1), 1, 1, config.token_budget)


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
                started = time.process_time()
                policy.update(phase, minibatch, method.loss, 0)
                seconds[phase] = seconds.get(phase, 0.0) + time.process_time() - started
        found.append(seconds)
    return {stage: statistics.median(each[stage] for each in found[1:]) for stage in found[0]}


def _sampling(sampler: Any, made: list[Group], config: PlanConfig) -> float:
    """Seconds of sampling thoughts about the responses of `made`."""
    sampler.stop_ids = frozenset()  # every thought has its full length
    some = [group.sequences[k][0] for group in made for k in range(2)]
    asked = [one.ids[: one.thought.start] for one in some]
    started = time.process_time()
    thoughts = sampler.sample(
        asked, config.num_generations, max_tokens=config.max_completion_length, temperature=1.0, seed=0
    )
    taken = time.process_time() - started
    assert all(len(thought.ids) == config.max_completion_length for each in thoughts for thought in each)
    return taken


def main() -> None:
    """The command."""
    parser = command.parser("plan", __doc__)
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
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
        model, options = SETTINGS[name]
        profile = measured(Compute.resolve("fp32"), ALONE, time.process_time)
        with tempfile.TemporaryDirectory() as folder:
            config = configured(model, options, Path(folder))
            cases[name] = {"predicted": predicted(config, profile), "measured": timed(config, args.repeats)}
            cases[name]["profile"] = profile.to_yaml()
        show(name, cases[name], console)
    if args.json:
        content = {"benchmark": "plan", "machine": machine(), "cases": cases}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def show(name: str, case: dict[str, Any], console: Console) -> None:
    """Print a table of one setting, by stage and in total."""
    said, real = case["predicted"], case["measured"]
    rows = [(stage, said[stage], real[stage]) for stage in real] + [("step", sum(said.values()), sum(real.values()))]
    lines = [(stage, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}") for stage, a, b in rows]
    heads = ("stage", "predicted, s", "measured, s", f"ratio (asked {1 - ASKED} to {1 + ASKED})")
    console.print(command.table(name, heads, lines))


if __name__ == "__main__":
    main()
