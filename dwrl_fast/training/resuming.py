"""Chooses the checkpoint from which a run resumes, renames damaged later ones, and continues the data. Another run is
never overwritten.
"""

from pathlib import Path
from typing import Any

from dwrl_fast.config import NEWEST
from dwrl_fast.errors import CheckpointError
from dwrl_fast.feed import Feed
from dwrl_fast.log import logger
from dwrl_fast.training.checkpoint import Place, checkpoints, latest_checkpoint, place_of, read_state, set_aside
from dwrl_fast.training.runlog import METRICS, read_metrics


def found(folder: Path, wanted: str) -> Path | None:
    """The checkpoint that --resume_from_checkpoint `wanted` names for a run in `folder`; None if the run starts from
    the beginning. Raises CheckpointError if there is no usable checkpoint and the run must not start from the
    beginning.
    """
    refuse_mixed(folder, wanted)
    path = latest_checkpoint(folder) if wanted in NEWEST else Path(wanted)
    if path is None:
        _refuse_finished(folder)
        if checkpoints(folder):
            raise CheckpointError(
                f"{folder} holds checkpoints, but none is intact (see above). Move them away to start again."
            )
        if wanted != "auto":
            logger.warning("%s holds no checkpoint to resume from: the run starts from the beginning.", folder)
    return path


def repeated(folder: Path, wanted: str | None) -> str | None:
    """The value of --resume_from_checkpoint that `wanted` means for a run in `folder`: latest, if `wanted` is the
    checkpoint of another folder that this run began from. So the same command, given again, continues the run.
    """
    if wanted is None or _of_folder(folder, wanted) or (newest := latest_checkpoint(folder)) is None:
        return wanted
    if read_state(newest).get("origin") != str(Path(wanted).resolve()):
        return wanted
    logger.info("The run in %s began from %s and continues from its own newest checkpoint.", folder, wanted)
    return "latest"


def refuse_mixed(folder: Path, wanted: str) -> None:
    """Raise CheckpointError if --resume_from_checkpoint `wanted` names a checkpoint of another folder, and `folder`
    holds a run, which would be overwritten.
    """
    if _of_folder(folder, wanted):
        return
    _refuse_finished(folder)
    own = [path.name for path in checkpoints(folder)]
    held = own + [METRICS] * _mixed(folder / METRICS, place_of(Path(wanted).resolve()))
    if held:
        remedy = ", or --resume_from_checkpoint latest to continue the run in it" if own else ""
        raise CheckpointError(
            f"{folder} holds {', '.join(held)} of a run that {wanted} does not belong to. Nothing is overwritten: give "
            f"another --output_dir{remedy}."
        )


def set_later_aside(folder: Path, path: Path, wanted: str) -> None:
    """Rename the damaged checkpoints in `folder` that are later than `path`. Raises CheckpointError if they may be
    intact.
    """
    place = place_of(path)
    for later in checkpoints(folder, past=(-1, 0) if place is None else place):
        if wanted not in NEWEST:
            raise CheckpointError(
                f"{folder} holds {later.name}, which is later than {path} and would have to be overwritten. Give "
                "another --output_dir, or move the later checkpoints away."
            )
        logger.warning("%s is damaged and was renamed to %s.", later, set_aside(later).name)


def restore_data(
    feed: Feed, path: Path, state: list[dict[str, Any]], batches: int, identity: Any, *, anyway: bool
) -> None:
    """Continue `feed` from the `state` of the feed with `identity` after `batches` rollout batches, from the checkpoint
    at `path`. If that does not fit the data of this run, CheckpointError is raised, or with `anyway` the data starts
    from its beginning. Raises also like `Feed.restore`.
    """
    why = feed.misfit(state, batches, identity)
    if not why:
        feed.restore(state)
        return
    if not anyway:
        raise CheckpointError(
            f"{path} does not fit the data of this run: {why}. Restore what {path.parent / 'config.yaml'} names, "
            "or start a new run in another --output_dir."
        )
    logger.warning(
        "--resume_anyway: the data set starts from its beginning, because %s. What is lost: rows of the %d rollout "
        "batches so far are used again, and others less often.",
        *(why, batches),
    )


def _of_folder(folder: Path, wanted: str) -> bool:
    """Whether --resume_from_checkpoint `wanted` means a checkpoint in `folder`."""
    return wanted in NEWEST or Path(wanted).resolve().parent == folder.resolve()


def _mixed(metrics: Path, place: Place | None) -> bool:
    """Whether rows of `metrics` would stay before those of a run from `place`, or may. Later rows alone are of such a
    run that was killed before its first checkpoint: it writes them again.
    """
    if place is None or not metrics.exists():
        return metrics.exists()
    return any(row["step"] <= place[0] for row in read_metrics(metrics))


def _refuse_finished(folder: Path) -> None:
    """Raise CheckpointError if the folder holds a model, which this run would overwrite."""
    held = [name for name in ("model", "adapter") if (folder / name).exists()]
    if held:
        raise CheckpointError(
            f"{folder} holds {' and '.join(held)} of a finished run, but no checkpoint to continue from. A finished "
            "run is never overwritten: give another --output_dir."
        )
