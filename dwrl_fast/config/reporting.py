"""Options that send data of a run elsewhere: metrics to trackers, and the model to the hub."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from dwrl_fast.options import Options, option

tracker_option = partial(option, group="Trackers")
hub_option = partial(option, group="Hugging Face hub")
pushed_option = partial(hub_option, needs=("push_to_hub", True))


@dataclass(frozen=True, kw_only=True)
class ReportingOptions(Options):
    """The options of trackers and of the hub."""

    report_to: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = tracker_option(
        (),
        "Experiment trackers that get the options, the figures and some of the thoughts during the run. none: "
        "nothing is sent anywhere. docs/training.md lists the names of the figures and where each tracker writes.",
    )
    project: str = tracker_option("dwrl_fast", "Project of the trackers; the experiment of MLflow.")
    run_name: str | None = tracker_option(None, "Name of the run in the trackers. none: the name of the output folder.")
    push_to_hub: bool = hub_option(
        False,
        "Upload OUTPUT_DIR/model, with its model card, to the Hugging Face hub at the end of the run. The token of `hf "
        "auth login` or HF_TOKEN is checked, and the repository created, before the run starts.",
    )
    hub_model_id: str | None = pushed_option(
        None, "Repository to upload to: NAME, or USER/NAME. none: the name of the output folder."
    )
    hub_private_repo: bool = pushed_option(
        True, "Create the repository as a private one. A repository that exists already stays as it is."
    )
