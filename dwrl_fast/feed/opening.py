"""Opens the rows that the options name: for training as a feed, for evaluation as a list."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dwrl_fast.config import CommonOptions, TrainConfig
from dwrl_fast.data import Dataset, Demonstration, Preference, Reader, open_rows, read_preferences
from dwrl_fast.data.mixture import Part
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import drop_long, fit
from dwrl_fast.errors import DataError
from dwrl_fast.feed.feed import Feed
from dwrl_fast.feed.memory import Shuffled
from dwrl_fast.feed.source import Source, with_aspect
from dwrl_fast.feed.stream import Streamed
from dwrl_fast.log import logger
from dwrl_fast.methods import METHODS
from dwrl_fast.progress import Display

Read = Callable[..., Dataset]  # (name of the file, columns, limit)


def open_feed(config: TrainConfig, dialog: Dialog | SingleTurn, display: Display) -> tuple[Feed, int]:
    """The training rows, and the tokens of the longest sequence with an empty thought (for a stream, where this is
    unknown, --max_length). Raises DataError if a file cannot be read or has no usable row.
    """
    imitated = METHODS[config.method].imitates
    parts = config.dataset_mixture or (Part(str(config.dataset_name), 1.0),)
    streams = ["order", *(f"order {i}" for i in range(1, len(parts)))]
    sources: list[Source] = []
    longest = config.max_length if config.streaming else 0
    for part, stream in zip(parts, streams, strict=True):
        if config.streaming:
            sources.append(_stream(part, stream, config, dialog, imitated))
        else:
            rows, tokens = _read_whole(part, config, dialog, display, imitated=imitated)
            sources.append(Shuffled(part.dataset_name, rows, config.seed, stream))
            longest = max(longest, tokens)
    feed = Feed(
        sources,
        [part.weight or 1.0 for part in parts],
        batch_size=config.rollout_batch_size,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
    )
    if len(parts) > 1:
        _say_shares(feed)
    return feed, longest


def read_rows(
    parts: Sequence[Part],
    config: CommonOptions,
    dialog: Dialog | SingleTurn,
    display: Display,
    limit: int | None = None,
    read: Read | None = None,
    *,
    imitated: bool = False,
) -> tuple[list[Preference], int]:
    """The usable rows of the files (the first `limit` of each), one file after another, and the tokens of the longest
    sequence. Logs the rows that are not usable, with reasons. read: replaces `read_preferences` for files of another
    form. imitated: whether a model imitates the rows. Rows with thought and verdict are then accepted, and only the
    best response of several is read.
    """
    rows: list[Preference] = []
    longest = 0
    for part in parts:
        more, tokens = _read_whole(part, config, dialog, display, limit, imitated, read)
        rows, longest = rows + more, max(longest, tokens)
    return rows, longest


def _read_whole(
    part: Part,
    config: CommonOptions,
    dialog: Dialog | SingleTurn,
    display: Display,
    limit: int | None = None,
    imitated: bool = False,
    read: Read | None = None,
) -> tuple[list[Preference], int]:
    read = read or partial(read_preferences, **reading(part, config, dialog, imitated))
    dataset = read(part.dataset_name, columns=config.columns, limit=limit)
    if not imitated:
        refuse_demonstration(dataset.rows[0])
    dataset.rows = [with_aspect(row, part.aspect) for row in dataset.rows]
    with display.stage(f"encode {Path(part.dataset_name).name}", len(dataset.rows)) as stage:
        dialog.counts.clear()
        longest = drop_long(dataset, dialog, config.max_length, stage.advance)
    logger.info(dataset.summary)
    for line in dataset.warnings:
        logger.warning("%s: %s", part.dataset_name, line)
    if dialog.counts:
        counts = ", ".join(f"{count} {what}" for what, count in dialog.counts.most_common())
        logger.info("conversations that are kept but counted: %s", counts)
    return dataset.rows, longest


def reading(part: Part, config: CommonOptions, dialog: Dialog | SingleTurn | None, imitated: bool) -> dict[str, Any]:
    """The arguments of `read_preferences` from the options, except the columns. dialog: asks the questions; None if it
    cannot be built. imitated: as of `read_rows`.

    The labels are about the aspect that the questions are about. Without an option, that is the one that was named when
    the model was trained.
    """
    aspect = part.aspect or getattr(config, "aspect", None)
    if aspect is None and dialog is not None:
        aspect = dialog.named_aspect
    options = {"ties": config.ties, "rankings": config.rankings, "layout": config.layout}
    return options | {"aspect": aspect, "best_only": imitated}


def refuse_demonstration(row: Preference) -> None:
    """Raise DataError if a row does not say which response is preferred."""
    if isinstance(row, Demonstration):
        raise DataError(
            f"{row.source}: a judgement with its thought and verdict. Only --method sft trains on such rows, and no "
            "model is evaluated on them: give preferences here, as docs/data.md has them"
        )


def _stream(part: Part, stream: str, config: TrainConfig, dialog: Dialog | SingleTurn, imitated: bool) -> Streamed:
    def check(row: Preference) -> tuple[str, Counter[str]]:
        if not imitated:
            refuse_demonstration(row)
        dialog.counts.clear()
        _, reason = fit(row, dialog, config.max_length)
        return reason, Counter({f"conversations {what}": count for what, count in dialog.counts.items()})

    source = open_rows(part.dataset_name)
    reader = Reader(source, columns=config.columns, consecutive=True, **reading(part, config, dialog, imitated))
    for outcome in reader.read():  # reports a missing or malformed file before the model is loaded
        if outcome.error is not None:
            raise outcome.error
        for line in reader.unread.warnings(outcome.notes):
            logger.warning("%s, first row: %s", part.dataset_name, line)
        break
    return Streamed(
        reader,
        check,
        buffer_size=config.shuffle_buffer_size,
        seed=config.seed,
        stream=stream,
        aspect=part.aspect,
        salt=config.max_length,
    )


def _say_shares(feed: Feed) -> None:
    for source, weight in zip(feed.sources, feed.weights, strict=True):
        rows = feed.total * weight
        passes = f", {rows / source.rows:.2f} passes over its {source.rows:,} rows" if source.rows else ""
        logger.info(
            "%s: %.1f %% of the mixture, about %s rows of this run%s", source.name, 100 * weight, f"{rows:,.0f}", passes
        )
