"""`python -m dwrl_fast.train`: trains a preference model on your pairs or, without arguments, on the embedded task."""

import dataclasses
import json
import platform
import time
from contextlib import ExitStack, closing, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dwrl_fast import __version__, embedded
from dwrl_fast.compute import Compute, one_thread
from dwrl_fast.config import NEWEST, TrainConfig, parse_train
from dwrl_fast.console import command, open_console
from dwrl_fast.doctor import check_start
from dwrl_fast.embedded.options import embedded_options, on_embedded
from dwrl_fast.errors import CheckpointError, ConfigError, Stopped, UntrainedError
from dwrl_fast.feed import Feed, open_feed, read_rows, warn_of_shared_prompts
from dwrl_fast.lock import sole_writer
from dwrl_fast.log import logger
from dwrl_fast.methods import METHODS
from dwrl_fast.models.hub import check_account, claim, push
from dwrl_fast.models.model import check_positions, check_vocabulary
from dwrl_fast.models.pretrained import try_saving
from dwrl_fast.progress import Display, Stage
from dwrl_fast.ranks import ALONE, Ranks, start
from dwrl_fast.sampling import KeptThoughts
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.training.card import write_card
from dwrl_fast.training.checkpoint import checkpoints
from dwrl_fast.training.dry_run import dry_run
from dwrl_fast.training.plots import plot_curves
from dwrl_fast.training.policy import load_judging
from dwrl_fast.training.resuming import refuse_mixed, repeated
from dwrl_fast.training.runlog import METRICS, read_metrics, write_json
from dwrl_fast.training.trackers import Trackers, check_installed, open_trackers
from dwrl_fast.training.trainer import Trainer

BASELINE = "bt"  # also trained on the embedded task, for comparison
PREFILLED = "prefilled.jsonl"  # the thoughts of `bt --prefilled_thoughts`
RESULT = "result.json"  # a folder with this file holds a finished run; only the upload to the hub comes after it
WRITTEN = ("config.yaml", "model", "adapter", METRICS, "thoughts", PREFILLED, RESULT)
OWN_DATA = """\
Your own data: a JSONL file of {"prompt": ..., "chosen": ..., "rejected": ...}, then
  python -m dwrl_fast.train --model_name_or_path MODEL --dataset_name pairs.jsonl --eval_dataset_name held_out.jsonl"""


def main(argv: list[str]) -> None:
    """The command. Raises UntrainedError if no rollout batch trained anything."""
    console = open_console()
    config = configure(argv)
    check_installed(config.report_to)
    ranks = start(config.ddp_timeout, hsdp=config.hsdp)
    for name in ("reshard_after_backward", "ddp_timeout", "hsdp"):
        if ranks.mesh is None and config.changed(name):
            logger.warning("%s has no effect here: it applies only to processes that torchrun started.", name)
    if config.dry_run:
        if not ranks.first:
            return
        if config.push_to_hub:
            check_account()
        if config.output_dir is not None:
            wanted = Path(config.output_dir)
            if next(path for path in (wanted, *wanted.absolute().parents) if path.exists()).is_file():
                make_folder(wanted)  # its error says why the folder cannot be created
            if (resumed := repeated(wanted, config.resume_from_checkpoint)) is None:
                refuse_used(config, wanted)
            else:
                refuse_mixed(wanted, resumed)
        dry_run(config, console, ranks)
        return
    try:
        result = run(config, console, ranks)
    except KeyboardInterrupt as error:
        folder = None if config.output_dir is None else Path(config.output_dir)
        said = isinstance(error, Stopped) and error.saved
        if not said and folder is not None and ranks.first and checkpoints(folder):  # the resumed run verifies them
            console.print(f"\n{folder} can be resumed: add --resume_from_checkpoint latest", highlight=False)
        raise
    if not result.get("trained", True):
        raise UntrainedError(
            f"training had no effect in any of the {result['steps']} rollout batches: {result['why']}."
        )


def configure(argv: list[str]) -> TrainConfig:
    """The options of the command line. Without data of the user they override the recipe of the embedded task."""
    return parse_train(argv, base=embedded_options)


def run(config: TrainConfig, console: Console, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The whole run of the command. Writes everything below its folder and returns the content of result.json. A
    finished run that is to be resumed is left unchanged, but its model is uploaded if that is still to be done. ranks:
    all of them call this together, with a folder that all of them can read.
    """
    name = f"runs/{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.output_dir or ranks.from_first(lambda: name))
    make_folder(folder)
    with sole_writer(folder, "its run") if ranks.first else nullcontext():
        resumed = ranks.from_first(lambda: repeated(folder, config.resume_from_checkpoint))
        config = dataclasses.replace(config, output_dir=str(folder), resume_from_checkpoint=resumed)
        result = ranks.from_first(lambda: begun(config, folder)) or run_in(folder, config, console, ranks)
        upload(folder, result, console, ranks)
        ranks.gather(None)  # no rank ends while the first still writes
        return result


def begun(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The content of result.json if `folder` holds a finished run; empty if the run is to start or resume."""
    if config.resume_from_checkpoint is None:
        refuse_used(config, folder)
    elif (folder / RESULT).exists():
        return finished(config, folder)
    else:
        refuse_mixed(folder, config.resume_from_checkpoint)
    return {}


def run_in(folder: Path, config: TrainConfig, console: Console, ranks: Ranks) -> dict[str, Any]:
    """The run, in a folder that no other process writes to."""
    started = time.monotonic()
    repository = None
    if config.push_to_hub:
        repository = ranks.from_first(lambda: claim(config.hub_model_id, folder, private=config.hub_private_repo))
    resumed = config.resume_from_checkpoint is not None
    trackers = ranks.agreed(lambda: open_trackers(config, folder, resumed=resumed) if ranks.first else Trackers())
    with Display(console) as display, trackers:
        if config.own_data:
            result = train(config, folder, display, config, ranks, trackers)
        else:
            with one_thread():
                result = train_embedded(config, folder, display, ranks, trackers)
    result |= {"seconds": time.monotonic() - started, "seed": config.seed, "versions": versions()}
    if repository is not None and not result.get("trained", True):
        logger.warning("Nothing was trained, so nothing is uploaded to %s on the hub.", repository)
    elif repository is not None:
        result["hub_repository"] = repository
    if ranks.first:
        write_card(folder, config, result, repository=repository, processes=ranks.count)
        write_json(folder / RESULT, result)
        report(result, config, folder, console)
    return result


def upload(folder: Path, result: dict[str, Any], console: Console, ranks: Ranks) -> None:
    """Upload the model of the finished run in `folder`, if `result` names a repository and no commit yet, and add the
    commit to `result` and to result.json: a run that ends before that uploads its model when it is resumed.
    """
    if "hub_repository" not in result or "hub_commit" in result:
        return
    result["hub_commit"] = ranks.from_first(lambda: push(folder / "model", result["hub_repository"]))
    if ranks.first:
        write_json(folder / RESULT, result)
    console.print(f"On the hub: {result['hub_commit']}", markup=False, highlight=False, soft_wrap=True)


def refuse_used(config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError if `folder` holds files of an earlier run: nothing is overwritten."""
    written = WRITTEN if config.own_data else (*WRITTEN, "embedded", "bt")
    used = [name for name in written if (folder / name).exists()] + [p.name for p in checkpoints(folder)]
    if used:
        raise ConfigError(
            f"--output_dir {folder} holds {', '.join(used)} already. Give another folder, or resume the run in it "
            "with --resume_from_checkpoint latest."
        )


def finished(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The content of result.json of the run in `folder`. Raises ConfigError if `config` does not resume that run, and
    CheckpointError if some of its files are missing.
    """
    again = f"Remove {folder / RESULT}: the same command then writes it again from the last checkpoint."
    if not (folder / "model").is_dir():
        raise CheckpointError(f"{folder} holds a finished run, but its model is missing. {again}")
    try:
        result = dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / RESULT} cannot be read: {error}. {again}") from None
    mine = config.to_dict()
    was = parse_train(["--config", str(folder / "config.yaml")]).to_dict()
    apart = ("output_dir", "resume_from_checkpoint", "resume_anyway")
    other = [f"{name} was {was[name]!r}, is {value!r}" for name, value in mine.items() if value != was[name]
             and name not in apart]  # fmt: skip
    if other or config.resume_from_checkpoint not in NEWEST:
        what = f" with other options ({'; '.join(other)})" if other else ""
        raise ConfigError(
            f"--output_dir {folder} holds a finished run{what}, which is never overwritten: give another folder."
        )
    if "hub_repository" in result and "hub_commit" not in result:
        logger.info("%s holds the finished run: only the upload of its model was left to do.", folder)
    else:
        logger.info("%s holds the finished run: nothing was left to do, and nothing was written.", folder)
    return result


def make_folder(folder: Path) -> None:
    """Create `folder`. Raises ConfigError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be made: {error}. Give a writable folder.") from error


def train(
    config: TrainConfig,
    folder: Path,
    display: Display,
    saved: TrainConfig,
    ranks: Ranks = ALONE,
    trackers: Trackers | None = None,
) -> dict[str, Any]:
    """Train one method on the given files, report to `trackers` and plot its curves. saved: the configuration that
    would repeat this run.
    """
    compute = Compute.resolve(config.dtype)
    dialog = load_dialog(config)
    if METHODS[config.method].trains:
        feed, longest = open_feed(config, dialog, display)
    else:
        logger.info("%s trains nothing: the model is evaluated unchanged, and saved for later use", config.method)
        feed, longest = Feed([], [], batch_size=config.rollout_batch_size, epochs=0, max_steps=0), 0
    held_out, unseen = read_rows(config.eval_dataset_name, config, dialog, display)
    warn_of_shared_prompts(feed, held_out)
    method = METHODS[config.method](config, dialog)
    judging = load_judging(config, method, dialog, compute, ranks)
    model = judging.runtime.model
    check_vocabulary(model, max(len(dialog.tokenizer) - 1, dialog.pad_id))
    writes = method.thinks or bool(method.thoughts_each)
    check_positions(model, max(longest, unseen) + config.max_completion_length * writes)
    check_start(config, method, judging.runtime, longest)
    if config.gradient_checkpointing:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = sum(p.numel() for p in model.parameters())
    over = f"{ranks.count} x {compute.device}" if ranks.count > 1 else compute.device
    logger.info("%s: %s parameters on %s in %s", config.method, f"{parameters:,}", over, compute.dtype)
    if (whole := judging.runtime.whole()) is not None:
        try_saving(folder, whole, dialog, method.card())
    del whole
    with closing(judging.runtime):
        trainer = Trainer(config, method, judging, feed, held_out, folder, display, trackers)
        trainer.resume()
        if isinstance(judging.runtime.sampler, KeptThoughts):  # now: a checkpoint of another run was refused
            judging.runtime.sampler.keep_in(folder / PREFILLED, config.max_completion_length, ranks)
        if ranks.first:
            dataclasses.replace(saved, resume_from_checkpoint=None, resume_anyway=False).save(folder / "config.yaml")
        result = trainer.train()
    if ranks.first:
        curves = folder / "curves.png"
        plot_curves(read_metrics(folder / METRICS), curves, f"{config.method}, seed {config.seed}")
    return result


def train_embedded(
    config: TrainConfig, folder: Path, display: Display, ranks: Ranks, trackers: Trackers
) -> dict[str, Any]:
    """The demonstration: create the task and a warmed-up model, and train the method on it. For comparison, also train
    BT from the same model on the same pairs.
    """
    made = ranks.from_first(lambda: make_embedded(folder / "embedded", config, display))
    result = train(on_embedded(config, made), folder, display, config, ranks, trackers)
    result["seconds_by_stage"]["warm up"] = made.seconds
    result["warmup_state"] = made.state
    if config.method == BASELINE:
        return result
    compared = configure(["--method", BASELINE, "--seed", str(config.seed), "--output_dir", str(folder / "bt")])
    shared = {
        name: getattr(config, name)
        for name in ("dtype", "packing", "token_budget", "save_steps", "save_updates", "save_total_limit", "async_save")
    }
    resume = config.resume_from_checkpoint and "auto"
    compared = on_embedded(dataclasses.replace(compared, resume_from_checkpoint=resume, **shared), made)
    make_folder(folder / "bt")
    with sole_writer(folder / "bt", "its run") if ranks.first else nullcontext():
        bt = train(compared, folder / "bt", display, compared, ranks)
    result |= {"accuracy_bt": bt["accuracy_after"], "report_bt": bt["report_after"]}
    result["seconds_by_stage"]["bt"] = sum(bt["seconds_by_stage"].values())
    return result


def make_embedded(folder: Path, config: TrainConfig, display: Display) -> embedded.Embedded:
    """The pairs and the warmed-up model of the embedded task. A resumed run reads those that it saved. Raises
    ConfigError if they were drawn with other options.
    """
    if (folder / embedded.RECORD).exists():
        made = embedded.Embedded.read(folder)
        check_drawn(folder, made, config)
        return made
    with ExitStack() as stack:
        stages: dict[str, Stage] = {}

        def progress(name: str, done: int, total: int, info: dict[str, float]) -> None:
            if name not in stages:
                stages[name] = stack.enter_context(display.stage(f"warm up, {name}", total))
            stages[name].advance(done - stages[name].done, **info)

        return embedded.prepare(folder, config.seed, easy_fraction=config.easy_fraction, progress=progress)


def check_drawn(folder: Path, made: embedded.Embedded, config: TrainConfig) -> None:
    """Raise ConfigError if the pairs and the model in `folder` were drawn with other options than those of this run."""
    if made.drawn is None:
        logger.warning(
            "%s was written by an older version, which did not store how it was drawn: this run uses it without "
            "knowing whether --seed and --easy_fraction are the same.",
            folder,
        )
        return
    names = ("seed", "easy_fraction")
    other = [f"--{name} was {made.drawn[name]}, is {getattr(config, name)}" for name in names
             if made.drawn[name] != getattr(config, name)]  # fmt: skip
    if other:
        raise ConfigError(
            f"{folder} holds the pairs and the model of a run with other options: {'; '.join(other)}. Give another "
            f"--output_dir, or the earlier options; if {folder.parent} holds no checkpoint, you may also remove "
            f"{folder}."
        )


def versions() -> dict[str, str]:
    """The versions of the packages used. That of dwrl_fast comes from the code, because a checkout runs without being
    installed.
    """
    others = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"dwrl_fast": __version__, **others, "python": platform.python_version()}


def report(result: dict[str, Any], config: TrainConfig, folder: Path, console: Console) -> None:
    """Print the final table, the paths of the results, and the next commands."""
    thinks = METHODS[config.method].thinks
    votes = config.eval_votes if config.eval_votes > 1 and thinks else 0
    table = Table(title=f"Held-out pair accuracy, {config.method}, seed {config.seed}")
    kind = "one greedy thought" if thinks else "accuracy"
    for column in ("", kind, "95 % interval", *([f"{votes} thoughts"] if votes else [])):
        table.add_column(column, justify="left" if not column else "right")
    lines = {"before": "before", "after": f"after {config.method}", "bt": "bt on the same pairs (no thoughts)"}
    # A run that was resumed with other held-out rows has no report from before training.
    of_files = (key.partition("/")[2] for key in result if key.startswith(("report_before/", "report_after/")))
    names = dict.fromkeys(["", *of_files])
    for when, label in lines.items():
        for name in names:
            part = f"/{name}" if name else ""
            if (found := result.get(f"report_{when}{part}")) is None:
                continue
            many = result.get(f"accuracy_{when}_{votes}_thoughts{part}")
            cells = [f"{found['accuracy']:.3f}", f"{found['low']:.3f} to {found['high']:.3f}"]
            table.add_row(
                f"  {name}" if name else label, *cells, *(["" if many is None else f"{many:.3f}"] if votes else [])
            )
    if table.row_count:
        console.print(table)
    stages = ", ".join(f"{k} {v:.0f}" for k, v in result["seconds_by_stage"].items())
    rest = [
        f"Seconds: {result['seconds']:.0f} in all ({stages})",
        f"Model: {folder / 'model'}   figures: {folder / 'result.json'}"
        + f"   curves: {folder / 'curves.png'}" * (folder / "curves.png").exists(),
        f"Metrics: {folder / 'metrics.jsonl'}" + f"   thoughts: {folder / 'thoughts'}" * (folder / "thoughts").exists(),
    ]
    if not config.own_data:
        rest.append(OWN_DATA)
    else:
        rest.append("On other pairs:")
        rest.append(f"  python -m dwrl_fast.evaluate --model_name_or_path {folder}/model --dataset_name FILE")
    for line in rest:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command(main, ranks=True)
