"""`python -m dwrl_fast.data`: checks files of preferences, separates their usable rows, and writes the papers' data
sets as files.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from rich.console import Console
from rich.markup import escape

from dwrl_fast.console import command, open_console
from dwrl_fast.data import Message, Rankings, Ties, open_rows
from dwrl_fast.data.check import FileReport, check, find_overlap
from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.counts import Lengths, Measure
from dwrl_fast.data.fix import fix, quarantine_of, refuse_existing
from dwrl_fast.data.jsonl import JsonLines
from dwrl_fast.data.prepare import ON_TOPIC, prepare_data_set, refuse_written
from dwrl_fast.data.printing import plot_lengths, print_layouts, print_overlap, print_report, say
from dwrl_fast.data.split import Split
from dwrl_fast.errors import ConfigError, DataError, TemplateError
from dwrl_fast.log import escaped
from dwrl_fast.options import Options, at_least, option, option_fields, parse

if TYPE_CHECKING:
    from dwrl_fast.dialog import Dialog

# ruff: noqa: RUF009 - what option() returns is a dataclass field

VENDOR = "the papers' instruction-following data are a vendor's and not public; use ultrafeedback, or your own pairs."
LLEMMA = "the papers' pairs were sampled from a model of their own and are not public; use gsm8k or ultrainteract."

DO = "What to do (one of check, prepare and formats)"

_do = partial(option, group=DO)
_reading = partial(option, group="Reading")
_check = partial(option, group="With --check")
_prepare = partial(option, group="With --prepare")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """The options of `python -m dwrl_fast.data`."""

    command: ClassVar[str] = "python -m dwrl_fast.data"
    summary: ClassVar[str] = (
        "Examines files of preference data before training. Exit status: 0 if every row is accounted for, used or "
        "dropped with its reason; 1 if a file cannot be read or has no usable row."
    )
    groups: ClassVar[tuple[str, ...]] = (
        DO,
        "Reading",
        "With --check",
        "With --prepare",
    )
    examples: ClassVar[str] = """
# check a file: format, every row accounted for, lengths, duplicates, contradictions
python -m dwrl_fast.data --check pairs.jsonl

# check a training file and its test file, with shared prompts, and lengths in tokens
python -m dwrl_fast.data --check train.jsonl test.jsonl --tokenizer_name_or_path Qwen/Qwen2.5-3B-Instruct \\
    --plot lengths.png --json report.json

# list the layouts of public data that are read as published
python -m dwrl_fast.data --formats

# rename columns
python -m dwrl_fast.data --check ranked.parquet --columns responses=answers --columns scores=ratings

# write the usable rows to good.jsonl, the others to good.quarantine.jsonl with line and reason
python -m dwrl_fast.data --check pairs.jsonl --fix good.jsonl

# write a data set of the papers as train.jsonl and test.jsonl, from the hub or from a copy
python -m dwrl_fast.data --prepare hh --output_dir data/hh
python -m dwrl_fast.data --prepare gsm8k --source example_model_solutions.jsonl --output_dir data/gsm8k

# make pairs that a small model can learn: which response answers this prompt?
python -m dwrl_fast.data --prepare on-topic --source pairs.jsonl --longest 450 --output_dir data/on-topic
"""

    check: tuple[str, ...] = _do((), "Check a file or data set, or two of them: a training file and its test file.")
    prepare: Literal["hh", "ultrafeedback", "ultrainteract", "gsm8k", "helpsteer", "rmb", "on-topic"] | None = _do(
        None,
        "Write a data set of the papers from its public files, in the papers' sizes. hh: 20,000 and 1,000 pairs of "
        "Anthropic HH. ultrafeedback: UltraFeedback binarized. ultrainteract: its pairs. gsm8k: right against wrong "
        "solutions of GSM8K by four models, not the pairs of the paper, which are not public. helpsteer: HelpSteer2, "
        "one score per response. rmb: the pairs of RMB. on-topic: from any --source, pairs whose worse response "
        "answers another prompt.",
        refused={"if": VENDOR, "complexif": VENDOR, "instruction_following": VENDOR, "math": LLEMMA},
    )

    formats: bool = _do(False, "List the known layouts, with their names for --layout.")

    columns: dict[str, str] = _reading({}, "Rename columns, as OURS=THEIRS: --columns chosen=better.")
    layout: str | None = _reading(
        None, "Layout of the files: a name from --formats, or plain. none: detected from the first row."
    )
    aspect: str | None = _reading(None, "Which scores to read, if a layout has scores by aspect.")
    ties: Ties = _reading("drop", "Pairs of equally good responses. drop: left out and counted. keep: used as ties.")
    rankings: Rankings = _reading(
        "pairs",
        "How a ranking of more than two responses is used. pairs: every pair. plackett_luce: one group.",
    )

    tokenizer_name_or_path: str | None = _check(
        None,
        "Measure lengths in tokens of this tokenizer, with its chat template, as --max_length does in training. "
        "none: in characters, which is many times faster.",
    )
    fix: str | None = _check(
        None,
        "Write the usable rows to this .jsonl file, unchanged, and the others to NAME.quarantine.jsonl in the same "
        "folder, each with line, reason and text. Existing files are not overwritten.",
    )
    json: str | None = _check(None, "Write the whole report, with every line number, to this JSON file.")
    plot: str | None = _check(None, "Draw histograms of the lengths into this PNG file.")

    output_dir: str | None = _prepare(
        None, "Folder for train.jsonl, test.jsonl and prepared.json, which accounts for every row."
    )
    source: str | None = _prepare(
        None,
        "Copy of the data set's repository (a folder), or one file of it; prompts of a single file are held out for "
        "the test. none: the hub.",
    )
    train_rows: int | None = _prepare(None, "Rows of train.jsonl. none: as in the papers, or all.", bound=at_least(1))
    longest: int | None = _prepare(
        None, "on-topic: maximum characters of a prompt with its response. none: no limit.", bound=at_least(1)
    )
    test_rows: int | None = _prepare(None, "Rows of test.jsonl. none: as in the papers, or all.", bound=at_least(1))
    seed: int = _prepare(0, "Seed of the split. No prompt is in both files.", bound=at_least(0))

    def validate(self) -> None:
        """Raises ConfigError if options contradict each other, or if an output file exists."""
        if bool(self.check) + (self.prepare is not None) + self.formats != 1:
            raise ConfigError("give one of --check FILE, --prepare DATA_SET and --formats; --help shows what they do")
        self._validate_check()
        if self.prepare is not None:
            if self.output_dir is None:
                raise ConfigError(f"--prepare {self.prepare}: give --output_dir, the folder for its files")
            refuse_written(Path(self.output_dir))
            if self.longest is not None and self.prepare != ON_TOPIC:
                raise ConfigError(f"--longest belongs to --prepare on-topic; {self.prepare} keeps its rows as they are")
        wants = {f.name: f.metadata["group"].removeprefix("With --") for f in option_fields(type(self))}
        for name in sorted(self.explicit):
            if wants[name] in ("check", "prepare") and not getattr(self, wants[name]):
                raise ConfigError(f"--{name} belongs to --{wants[name]}, which is not given")

    def _validate_check(self) -> None:
        if len(self.check) > 2:
            raise ConfigError(f"--check {' '.join(self.check)}: one file, or two: a training file and its test file")
        if self.fix is not None and len(self.check) > 1:
            raise ConfigError("--fix writes the rows of one file: give --check only that one")
        if self.fix is not None:
            refuse_existing(Path(self.fix))
        self.check_new_files("json", "plot")


def main(argv: list[str]) -> None:
    """The command. A DataError ends it with status 1."""
    console = open_console()
    config = parse(DataConfig, argv)
    try:
        if config.formats:
            print_layouts(console)
        else:
            (run_check if config.prepare is None else run_prepare)(config, console)
    except DataError as error:
        print(escaped(f"\nerror: {error}"), file=sys.stderr)
        sys.exit(1)


def run_check(config: DataConfig, console: Console) -> None:
    """Check the files and write the requested outputs. Raises DataError if a file has no usable row."""
    dialog = None if config.tokenizer_name_or_path is None else dialog_of(config.tokenizer_name_or_path)
    reports = []
    for name in config.check:
        reports.append(check_one(name, config, console, None if dialog is None else tokens(dialog)))
        print_report(reports[-1], console)
        if dialog is not None and dialog.counts:
            counts = ", ".join(f"{count:,} {what}" for what, count in dialog.counts.most_common())
            say(console, f"Conversations that are kept but counted: {counts}")
            dialog.counts.clear()
    overlap = find_overlap(*reports) if len(reports) == 2 else None
    if overlap is not None:
        print_overlap(overlap, reports[0], reports[1], console)
    if config.json is not None:
        found = {"files": [found.to_dict() for found in reports], "overlap": overlap and overlap.to_dict()}
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        say(console, f"Full report: {config.json}")
    if config.plot is not None and any(found.used for found in reports):
        plot_lengths(reports, Path(config.plot))
        say(console, f"Histograms: {config.plot}")
    if not all(found.used for found in reports):
        raise DataError("no usable row is left; see the reasons above")
    if config.fix is not None:
        run_fix(config, reports[0], console)


def check_one(name: str, config: DataConfig, console: Console, measure: Measure | None) -> FileReport:
    """Check one file; on a terminal, show the progress."""
    unit = "bytes" if isinstance(open_rows(name), JsonLines) else "rows"
    status = console.status("")

    def watch(done: int) -> None:
        status.update(f"{escape(name)}: {done:,} {unit} read")
        status.start()  # only at the first call: it starts a thread, and processes must be forked before that

    try:
        return check(
            name,
            columns=config.columns,
            ties=config.ties,
            rankings=config.rankings,
            layout=config.layout,
            aspect=config.aspect,
            measure=measure,
            progress=watch,
        )
    finally:
        status.stop()


def run_fix(config: DataConfig, found: FileReport, console: Console) -> None:
    """Write the two files, and check the good one again."""
    assert config.fix is not None
    good, bad = fix(config.check[0], found, Path(config.fix))
    again = check_one(config.fix, config, console, None)
    if again.used != good or again.dropped:
        raise DataError(
            f"{config.fix}: {len(again.dropped)} reasons to drop rows remain in the written file; run --fix on it "
            "again, with another output file"
        )
    say(
        console,
        f"{found.rows:,} rows = {good:,} in {Path(config.fix)} (read again and clean) + {bad:,} in "
        f"{quarantine_of(Path(config.fix))}",
    )


def run_prepare(config: DataConfig, console: Console) -> None:
    """Write the files of the data set and report what happened to its rows."""
    assert config.prepare is not None and config.output_dir is not None
    folder = Path(config.output_dir)
    with console.status(f"{config.prepare}: reading {config.source or 'from the hub'}"):
        found = prepare_data_set(
            config.prepare,
            folder,
            source=config.source,
            seed=config.seed,
            train_rows=config.train_rows,
            test_rows=config.test_rows,
            longest=config.longest,
        )
    for name, split in found.items():
        print_split(name, split, folder, console)
    say(console, f"Check them: python -m dwrl_fast.data --check {folder / 'train.jsonl'} {folder / 'test.jsonl'}")


def print_split(name: str, split: Split, folder: Path, console: Console) -> None:
    """Report what happened to the published rows of one split, and how many rows its file has."""
    dropped = {reason: len(rows) for reason, rows in split.dropped.items()}
    if split.read:
        left_out = split.read - split.used
        say(console, f"{name}: {split.read:,} published rows read = {split.used:,} used + {left_out:,} dropped")
    for what, count in (*dropped.items(), *split.notes.items()):
        say(console, f"  {count:,} x {what}")
    rest = [f"{split.withheld:,} left out because their prompt is in the test file"] if split.withheld else []
    rest += [f"{split.not_drawn:,} not drawn"] if split.not_drawn else []
    say(console, f"  {split.written:,} rows in {folder / name}.jsonl" + "".join(f"; {what}" for what in rest))


def dialog_of(tokenizer: str) -> "Dialog":
    """The dialog for a tokenizer, given as a folder or a hub name."""
    from dwrl_fast.dialog import Dialog
    from dwrl_fast.models.pretrained import load_tokenizer  # imports torch and transformers, not needed elsewhere

    return Dialog(load_tokenizer(tokenizer))


def tokens(dialog: "Dialog") -> Measure:
    """Lengths in tokens. The prompt's length includes everything that the chat template puts before the response."""

    def measure(prompt: Sequence[Message], responses: Sequence[str], aspect: str | None) -> Lengths:
        try:
            found = [dialog.plain(prompt, response) for response in responses]
        except TemplateError as error:
            raise Unusable(str(error)) from None
        return found[0].prompt.stop, [one.response.stop - one.response.start for one in found]

    return measure


if __name__ == "__main__":
    command(main)
