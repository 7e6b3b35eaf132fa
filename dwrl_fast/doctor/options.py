"""The options of `dwrl_fast.doctor`: those of training, for a set-up is examined as it would be trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from dwrl_fast.config import TrainConfig
from dwrl_fast.embedded.options import embedded_options
from dwrl_fast.methods import METHODS
from dwrl_fast.options import at_least, option, parse

ROWS = Path(__file__).with_name("rows.jsonl")  # pairs of general questions
doctor_option = partial(option, group="Doctor")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """The options of `python -m dwrl_fast.doctor`."""

    command: ClassVar[str] = "python -m dwrl_fast.doctor"
    summary: ClassVar[str] = (
        "Examines a set-up before it is trained: tokens, weights, thoughts, sampler against trainer, layouts, memory"
        " and, under torchrun, the ranks. It takes the options of dwrl_fast.train; those about updates, evaluation and"
        " checkpoints have no effect. Nothing is written except --json. Each line of the report is pass, warn or fail"
        " with its remedy; docs/doctor.md explains them. Without a model it examines the embedded one; without data it"
        " uses a few rows of its own. Exit status: 4 if a line fails, 2 if an option is wrong, otherwise 0."
    )
    groups: ClassVar[tuple[str, ...]] = ("Doctor", *TrainConfig.groups)
    examples: ClassVar[str] = """
# does this installation work? Uses the embedded model; takes about a minute
python -m dwrl_fast.doctor

# a model, on the packaged rows
python -m dwrl_fast.doctor --model_name_or_path Qwen/Qwen2.5-3B-Instruct

# a planned run: the same options as for dwrl_fast.train
python -m dwrl_fast.doctor --config mine.yaml --limit 16 --json report.json

# what this machine does in a second, for dwrl_fast.plan
python -m dwrl_fast.doctor --profile here.yaml

# the first thing to run on 8 GPUs
torchrun --nproc-per-node 8 -m dwrl_fast.doctor --config mine.yaml
"""

    limit: int = doctor_option(
        4, "Rows of the data to examine. Thoughts are sampled for all of them.", bound=at_least(1)
    )
    json: str | None = doctor_option(None, "Write the report with all its figures to this JSON file.")
    profile: str | None = doctor_option(
        None,
        "Measure what the device does in a second (products, memory, attention, links), and write it to this YAML file,"
        " from which `python -m dwrl_fast.plan --profile FILE` predicts times.",
    )

    def validate(self) -> None:
        """Raises ConfigError as training does, and where a file that is to be written cannot be made."""
        super().validate()
        self.check_new_files("json", "profile")


def parse_doctor(argv: Sequence[str]) -> DoctorConfig:
    """The options of a command line. A model without data gets ROWS, none at all those of the embedded task."""
    return parse(DoctorConfig, argv, base=_base)


def _base(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if not (given.get("model_name_or_path") or given.get("model_config")):
        return embedded_options(given)
    named = ("dataset_name", "dataset_mixture", "eval_dataset_name")
    if any(given.get(name) for name in named):
        return {}
    trains = METHODS[given.get("method", TrainConfig.method)].trains
    return {"dataset_name": str(ROWS)} if trains else {"eval_dataset_name": [str(ROWS)]}
