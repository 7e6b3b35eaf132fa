"""Experiment trackers (`--report_to`), through accelerate's integrations.

They receive the values of `metrics.jsonl`. Metrics with the same meaning as in TRL have TRL's names. If a tracker
cannot start, the run ends before training. If a tracker fails later, the run continues without it.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from dwrl_fast.config import TrainConfig
from dwrl_fast.errors import ConfigError
from dwrl_fast.files import bounded_json
from dwrl_fast.log import logger
from dwrl_fast.training.runlog import write_json

RECORD = "trackers.json"  # in the run's folder: the run id of each tracker, and the last step that it received
TABLE_ROWS = 256  # thoughts per rollout batch that a tracker receives; thoughts/ has all of them
UNSAFE = re.compile(r"[^\w\-. /]")  # characters that MLflow does not allow in names

# Names in metrics.jsonl -> names in TRL 1.16 with the same meaning. Any other metric is train/NAME.
NAMES = {
    "loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "reward": "train/reward",
    "reward_chosen": "train/rewards/chosen",
    "reward_rejected": "train/rewards/rejected",
    "reward_right": "train/rewards/chosen",
    "reward_wrong": "train/rewards/rejected",
    "reward_accuracy": "train/rewards/accuracies",
    "entropy": "train/entropy",
    "clip_fraction": "train/clip_ratio/region_mean",
    "thought_length": "train/completions/mean_length",
    "truncation_rate": "train/completions/clipped_ratio",
    "sampler_gap_mean": "train/sampling/sampling_logp_difference/mean",
    "sampler_gap_max": "train/sampling/sampling_logp_difference/max",
    "seconds": "train/step_time",
}
# For methods with one phase. Methods with two phases keep the phase in the name: train/learning_rate_score.
OF_ONE_PHASE = {"learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"}
EVALUATED = {"greedy": "accuracy"}  # eval/accuracy, and with more thoughts eval/accuracy_4_thoughts


def tracker_names(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite values of a line of metrics.jsonl, under the names that trackers receive."""
    phases = [name.removeprefix("learning_rate_") for name in values if name.startswith("learning_rate_")]
    alone = {f"{name}_{phases[0]}": theirs for name, theirs in OF_ONE_PHASE.items()} if len(phases) == 1 else {}
    names = NAMES | alone
    found = {names.get(name) or _own_name(name): value for name, value in values.items() if value is not None}
    return {UNSAFE.sub("_", name): value for name, value in found.items()}


def _own_name(name: str) -> str:
    if not name.startswith("eval_"):
        return f"train/{name}"
    kind, _, source = name.removeprefix("eval_").partition("/")  # with several evaluation files, the name of the file
    figure = EVALUATED.get(kind, f"accuracy_{kind}")
    return f"eval/{source}_{figure}" if source else f"eval/{figure}"


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError, with the pip command, if a package that the trackers `names` need is missing."""
    needed = [*(["accelerate"] if names else []), *names]
    specs = {name: find_spec(name) for name in needed}
    # A local folder of that name has a spec without an origin.
    if missing := [name for name, spec in specs.items() if spec is None or spec.origin is None]:
        wanted = " ".join(PACKAGES.get(name, name) for name in missing)
        raise ConfigError(f"--report_to {' '.join(names)} needs packages that are not installed: pip install {wanted}")


@dataclass(slots=True)
class Tracked:
    """A run in a tracker. run: its id there. last: the last step that the tracker received, plus one half after the
    evaluation at the end of training; -1 before the first step.
    """

    run: str
    last: float = -1


class Table(NamedTuple):
    """A table; each row has one cell per column."""

    columns: list[str]
    rows: list[list[Any]]


class Trackers:
    """The trackers of one run; a new object has none. As a context manager it closes them at the end.

    running: accelerate's trackers by name. known: the run of each tracker, also of those that failed. record: the file
    that stores `known` for a resumed run. table: thoughts that are sent with the next metrics.
    """

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}
        self.known: dict[str, Tracked] = {}
        self.record: Path | None = None
        self.table: Table | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in list(self.running):
            self._try(name, lambda tracker: tracker.finish())
        self.running = {}

    def metrics(self, step: int, values: Mapping[str, Any], *, again: bool = False) -> None:
        """Send the metrics of a step to all trackers that did not receive them before the run was resumed.
        again: further metrics of a step that was already sent.
        """
        named, place = tracker_names(values), step + again / 2
        for name in self._behind(place) if named else []:
            if self._try(name, lambda tracker, name=name: self._log(name, tracker, named, step)):
                self.known[name].last = place
        self.table = None
        self._save()

    def thoughts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the first thoughts of a step as a table, to send with the metrics of the step to trackers that support
        tables. rows: as in the files of thoughts.
        """
        shown = [row for row in rows if "thought" in row][:TABLE_ROWS]
        columns = list(dict.fromkeys(name for row in shown for name in row))
        self.table = Table(columns, [[row.get(name) for name in columns] for row in shown])

    def _log(self, name: str, tracker: Any, named: dict[str, float], step: int) -> None:
        if self.table is not None and self.table.rows and name in TABLES:
            TABLES[name](tracker, self.table, step)
        tracker.log(named, step=step)

    def _behind(self, step: float) -> list[str]:
        return [name for name in self.running if self.known[name].last < step]

    def _try(self, name: str, act: Callable[..., None]) -> bool:
        """Whether `act` succeeded. A tracker that fails is removed."""
        try:
            act(self.running[name])
        except Exception as error:  # of a network, a disk, a library
            del self.running[name]
            logger.error(
                "%s failed (%s: %s). The run continues without it, and metrics.jsonl has all metrics. A resumed "
                "run tries %s again.",
                *(name, type(error).__name__, error, name),
            )
            return False
        return True

    def _save(self) -> None:
        if self.running and self.record is not None:
            record, known = self.record, {name: asdict(each) for name, each in self.known.items()}
            try:
                write_json(record, known)
            except OSError as error:
                logger.error("%s: %s. It will be written with the next step.", record, error.strerror)


def open_trackers(config: TrainConfig, folder: Path, *, resumed: bool) -> Trackers:
    """Start the trackers of --report_to, with the options as hyperparameters. A run that is resumed in `folder`
    continues its earlier runs in the trackers. Raises ConfigError if a tracker cannot start.
    """
    found = Trackers()
    if not config.report_to:
        return found
    check_installed(config.report_to)
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers need it for their log messages
    found.record = folder / RECORD
    before = _read(found.record) if resumed else {}
    for name in config.report_to:
        arguments, options = _how(name, config, folder, before[name].run if name in before else None)
        try:
            tracker = found.running[name] = LOGGER_TYPE_TO_CLASS[name](*arguments, **options)
            tracker.start()
            if name not in before or name in FORGETFUL:
                tracker.store_init_configuration(hyperparameters(config))
            found.known[name] = before.get(name) or Tracked(RUN_IDS[name](tracker))
        except Exception as error:  # of a network, a disk, a library
            found.running.pop(name, None)
            found.__exit__(None, None, None)
            raise ConfigError(
                f"--report_to {name} cannot start ({type(error).__name__}: {error}). Correct this, or leave {name} "
                f"out: {folder / 'metrics.jsonl'} has all metrics without it.{HINTS.get(name, '')}"
            ) from error
    found._save()
    return found


def _read(record: Path) -> dict[str, Tracked]:
    if not record.exists():
        return {}
    try:
        return {name: Tracked(**each) for name, each in bounded_json(record).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{record} cannot be read ({error}). Remove it; the trackers then start new runs.") from None


def hyperparameters(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """All options; lists, mappings and null as JSON text."""
    values = config.to_dict()
    return {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in values.items()}


def _how(name: str, config: TrainConfig, folder: Path, run: str | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The arguments of accelerate's tracker. run: the id of a run to continue."""
    run_name = config.run_name or folder.absolute().name
    match name:
        case "tensorboard":
            return (name,), {"logging_dir": str(folder)}
        case "trackio":
            return (config.project,), {"name": run or f"{run_name}-{uuid.uuid4().hex[:6]}", "resume": "allow"}
        case "wandb":
            new = uuid.uuid4().hex
            return (config.project,), {"name": run_name, "id": run or new, "resume": "allow", "dir": str(folder)}
        case _:
            return (config.project,), {"run_name": run_name, "run_id": run}


def _trackio_table(tracker: Any, table: Table, step: int) -> None:
    import pandas
    import trackio

    frame = pandas.DataFrame(table.rows, columns=table.columns)
    tracker.log({"thoughts": trackio.Table(dataframe=frame)}, step=step)


def _wandb_table(tracker: Any, table: Table, step: int) -> None:
    tracker.log_table("thoughts", columns=table.columns, data=table.rows, step=step)


def _mlflow_table(tracker: Any, table: Table, step: int) -> None:
    import mlflow

    columns = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
    # One file per step, because MLflow uploads a file again when rows are added to it.
    mlflow.log_table(columns, f"thoughts/step-{step:06d}.json")


TABLES: dict[str, Callable[[Any, Table, int], None]] = {
    "trackio": _trackio_table,
    "wandb": _wandb_table,
    "mlflow": _mlflow_table,
}
RUN_IDS: dict[str, Callable[[Any], str]] = {
    "tensorboard": lambda tracker: "tensorboard",
    "trackio": lambda tracker: str(tracker.tracker.name),
    "wandb": lambda tracker: str(tracker.tracker.id),
    "mlflow": lambda tracker: str(tracker.tracker.info.run_id),
}
FORGETFUL = {"trackio", "wandb"}  # they need the options again when a run continues
# Names for pip that differ from the tracker's: the full package mlflow requires an older pandas.
PACKAGES = {"mlflow": "mlflow-skinny sqlalchemy alembic"}
HINTS = {"wandb": " With WANDB_MODE=offline, wandb writes only to the output folder."}
