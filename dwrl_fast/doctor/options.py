"""The options of `dwrl_fast.doctor`: those of training, because a setup is examined as it would be trained, and some
of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from dwrl_fast.config import TrainConfig
from dwrl_fast.embedded.options import embedded_options
from dwrl_fast.methods import METHODS
from dwrl_fast.options import at_least, option, parse

ROWS = Path(__file__).with_name("rows.jsonl")  # pairs about general questions
doctor_option = partial(option, group="Doctor")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """The options of `python -m dwrl_fast.doctor`."""

    command: ClassVar[str] = "python -m dwrl_fast.doctor"
    summary: ClassVar[str] = (
        "Tests a setup before training: tokens, weights, thoughts, sampler against trainer, packing, memory and, under"
        " torchrun, the ranks. It takes the options of dwrl_fast.train; those about updates, evaluation and checkpoints"
        " have no effect. Only --json and --profile write files. Each line of the report is pass, warn or fail with its"
        " remedy; docs/doctor.md explains them. Without a model the embedded model is tested; without data a few"
        " packaged rows are used. Exit status: 4 if a line fails, 2 if an option is wrong, otherwise 0."
    )
    groups: ClassVar[tuple[str, ...]] = ("Doctor", *TrainConfig.groups)
    examples: ClassVar[str] = """
# does this installation work? Uses the embedded model; takes about a minute
python -m dwrl_fast.doctor

# a model, on the packaged rows
python -m dwrl_fast.doctor --model_name_or_path Qwen/Qwen2.5-3B-Instruct

# a planned run: the same options as for dwrl_fast.train
python -m dwrl_fast.doctor --config mine.yaml --limit 16 --json report.json

# measure the speed of this machine, for dwrl_fast.plan
python -m dwrl_fast.doctor --profile here.yaml

# the first thing to run on 8 GPUs
torchrun --nproc-per-node 8 -m dwrl_fast.doctor --config mine.yaml
"""

    limit: int = doctor_option(
        4, "Rows of the data to test on. Thoughts are sampled for all of them.", bound=at_least(1)
    )
    json: str | None = doctor_option(None, "Write the report with all its figures to this JSON file.")
    profile: str | None = doctor_option(
        None,
        "Measure the speed of the device (matrix products, memory, attention, links), and write it to this YAML file."
        " `python -m dwrl_fast.plan --profile FILE` predicts times from it.",
    )

    def validate(self) -> None:
        """Raises ConfigError like training, and if an output file exists or cannot be created."""
        super().validate()
        self.check_new_files("json", "profile")


def parse_doctor(argv: Sequence[str]) -> DoctorConfig:
    """The options of a command line. A model without data is examined on ROWS. Without a model the embedded task is
    examined.
    """
    return parse(DoctorConfig, argv, base=_base)


def _base(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if not (given.get("model_name_or_path") or given.get("model_config")):
        return embedded_options(given)
    named = ("dataset_name", "dataset_mixture", "eval_dataset_name")
    if any(given.get(name) for name in named):
        return {}
    trains = METHODS[given.get("method", TrainConfig.method)].trains
    return {"dataset_name": str(ROWS)} if trains else {"eval_dataset_name": [str(ROWS)]}
