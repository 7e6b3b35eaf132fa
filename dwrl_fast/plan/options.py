"""The options of `dwrl_fast.plan`: those of the planned training run, and those of its hardware."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from dwrl_fast.config import TrainConfig
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods import METHODS
from dwrl_fast.options import POSITIVE, at_least, option, parse
from dwrl_fast.plan.lengths import Lengths
from dwrl_fast.plan.profile import load_profile

plan_option = partial(option, group="Plan")
NO_ROWS = "no rows are read"


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """The options of `python -m dwrl_fast.plan`."""

    command: ClassVar[str] = "python -m dwrl_fast.plan"
    summary: ClassVar[str] = (
        "Predicts what a training run needs: memory of each GPU by kind, the largest token budget that fits, FLOPs, "
        "the time of a step and an epoch by stage, and the cost, on 1 to 1,024 GPUs. It needs no GPU and no weights: "
        "the model's config.json is enough. It takes the options of dwrl_fast.train. Rows are not read; their "
        "lengths are options. The accuracy of the times depends on the profile of the device; docs/plan.md explains "
        "what is traced and what is computed, and compares both with real runs. Exit status: 4 if the run does not "
        "fit, 2 if an option is wrong."
    )
    groups: ClassVar[tuple[str, ...]] = ("Plan", *TrainConfig.groups)
    examples: ClassVar[str] = """
# a 7B model on one machine with 8 GPUs
python -m dwrl_fast.plan --model_config recipes/models/qwen2.5-7b.json --gpus 8 --gradient_checkpointing

# LoRA on one GPU
python -m dwrl_fast.plan --model_config recipes/models/qwen2.5-3b.json --gpus 1 --gpu_memory 24 --profile rtx4090 \\
    --use_peft --gradient_checkpointing --token_budget 4096

# a recipe, with a price, and a plot of all sizes
python -m dwrl_fast.plan --config recipes/backbones/qwen2.5-7b-instruct.yaml recipes/methods/dwrl.yaml \\
    --model_config recipes/models/qwen2.5-7b.json --gpus 16 --hsdp --price 2.5 --plot plan.png

# this machine, measured
python -m dwrl_fast.doctor --profile here.yaml
python -m dwrl_fast.plan --model_config models/smollm2/config.json --gpus 1 --profile here.yaml
"""

    gpus: int = plan_option(8, "GPUs, or processes of torchrun. 1 is one process without torchrun.", bound=at_least(1))
    gpus_per_machine: int = plan_option(8, "GPUs per machine; links within a machine are faster.", bound=at_least(1))
    gpu_memory: float | None = plan_option(None, "Memory of one GPU in GiB. none: that of the profile.", bound=POSITIVE)
    reserve_gib: float = plan_option(
        5.0,
        "GiB of each GPU to leave free, for CUDA, NCCL's buffers and memory that the allocator cannot use.",
        bound=at_least(0),
    )
    profile: str = plan_option(
        "h100",
        "Speed and memory of the device: h100, h200, a100, rtx4090 (published figures, times an assumed share), or a "
        "file that `python -m dwrl_fast.doctor --profile FILE` measured.",
    )
    price: float | None = plan_option(None, "Price of one GPU for one hour, in any currency.", bound=POSITIVE)
    rows: int = plan_option(10_000, "Preference groups per epoch.", bound=at_least(1))
    prompt_tokens: int = plan_option(256, "Mean tokens of a prompt.", bound=at_least(1))
    response_tokens: int = plan_option(200, "Mean tokens of a response; a group has two.", bound=at_least(1))
    thought_tokens: int = plan_option(300, "Mean tokens of a thought.", bound=at_least(1))
    plot: str | None = plan_option(None, "Draw memory, time and cost over the number of GPUs into this PNG.")
    json: str | None = plan_option(None, "Write all figures to this JSON file.")

    def validate(self) -> None:
        """Raises ConfigError like training, also for a number of GPUs that training refuses, and if there is nothing to
        plan.
        """
        super().validate()
        if not METHODS[self.method].trains:
            raise ConfigError(f"method = {self.method} trains nothing: there is no run to plan.")
        self.check_new_files("plot", "json")
        refused = self.refusal_on(self.gpus)
        if refused:
            raise ConfigError(f"gpus = {self.gpus}: {refused}")

    def refusal_on(self, gpus: int) -> str:
        """Why training refuses this run on `gpus` GPUs, and what to do; empty if it does not."""
        if self.hsdp and (gpus <= self.gpus_per_machine or gpus % self.gpus_per_machine):
            return (
                f"hsdp with {self.gpus_per_machine} GPUs in a machine needs several machines with equally many GPUs. "
                "Give --gpus a multiple of --gpus_per_machine, or leave hsdp out."
            )
        # Only cpu_offload depends on the device; the profile's file need not exist for the other options.
        cuda = not self.cpu_offload or load_profile(self.profile).device == "cuda"
        refused = self.refusal(sharded=gpus > 1, cuda=cuda)
        return f"{refused} --gpus 1 is one process without torchrun." if refused else ""

    def _refuse_two_models(self) -> None:
        """Both are allowed here: --model_config may give the configuration of a recipe's model if the hub cannot be
        reached.
        """

    def _refuse_drawn_base(self) -> None:
        """Adapters are allowed here: a model from a configuration is planned like one with weights."""

    @property
    def lengths(self) -> Lengths:
        """The lengths of the planned groups."""
        return Lengths(self.prompt_tokens, self.response_tokens, self.thought_tokens)


def parse_plan(argv: Sequence[str]) -> PlanConfig:
    """The options of a command line. Raises ConfigError if it names no model."""
    return parse(PlanConfig, argv, base=_base)


def _base(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if not (given.get("model_name_or_path") or given.get("model_config")):
        raise ConfigError(
            "there is no model to plan for: give --model_config CONFIG.json (recipes/models has the papers' "
            "backbones), or --model_name_or_path"
        )
    named = ("dataset_name", "dataset_mixture", "eval_dataset_name")
    return {} if any(given.get(name) for name in named) else {"dataset_name": NO_ROWS}
