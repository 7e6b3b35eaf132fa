"""`python -m dwrl_fast.evaluate`: measures how well a model judges preferences."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwrl_fast.config import BEST_OF, VOTE_CURVE, EvaluateConfig, JudgingOptions, parse_evaluate
from dwrl_fast.console import command, open_console
from dwrl_fast.data import Preference
from dwrl_fast.data.jsonl import finite
from dwrl_fast.errors import ConfigError
from dwrl_fast.evaluation.benchmarks import check_benchmark, scored_as
from dwrl_fast.evaluation.calibration import calibration, fit_temperature
from dwrl_fast.evaluation.figures import figures
from dwrl_fast.evaluation.judged import Judged
from dwrl_fast.evaluation.page import page
from dwrl_fast.evaluation.pairs import PairReport, check_ordered
from dwrl_fast.evaluation.probe import ProbeReport, pairs_of, probe, responses_each
from dwrl_fast.evaluation.report import Report, make_report, markdown, sections
from dwrl_fast.evaluation.rewardbench import read_best_of
from dwrl_fast.evaluation.scoring import PartFile, Steps, score_rows
from dwrl_fast.evaluation.table import PairTable
from dwrl_fast.evaluation.units import Units
from dwrl_fast.evaluation.votes import vote_curve
from dwrl_fast.feed import read_rows
from dwrl_fast.feed.source import content_hash
from dwrl_fast.log import logger, warn_once
from dwrl_fast.models.hub import judge_folder, on_hub
from dwrl_fast.models.pretrained import CARD, has_card, load_card
from dwrl_fast.progress import Display, Stage
from dwrl_fast.scoring.scorer import Scorer

PART = "scores.part.jsonl"
REPORT = "report.json"
STAGES = {"rows": ("score", "pairs or rankings were scored"), "probe": ("probe", "pairs were probed")}


def main(argv: list[str]) -> None:
    """The command."""
    console = open_console()
    run(parse_evaluate(argv), console)


def run(config: EvaluateConfig, console: Console) -> PairReport:
    """Score the pairs of the files and print the report. With --output_dir, also write it there."""
    folder = None if config.output_dir is None else open_folder(Path(config.output_dir))
    started = time.monotonic()
    model = config.model_name_or_path
    if config.method is None:
        model = str(judge_folder(model, config.revision))
    if config.calibrate and on_hub(config.model_name_or_path):
        raise ConfigError(
            f"calibrate: the temperature is stored in the model's folder, and {config.model_name_or_path} is on the "
            f"hub. Fetch it by `hf download {config.model_name_or_path} --local-dir DIR` and give that folder."
        )
    scorer = load(config, model)
    if config.vote_curve and not scorer.thinks:
        raise ConfigError("vote_curve: this model judges without thoughts, so there are no votes. Leave it out.")
    for name in ("votes", "temperature", "max_completion_length"):
        if config.changed(name) and not scorer.thinks:
            warn_once(f"{name} has no effect here: this model judges without thoughts.")
    with Display(console) as display:
        rows, longest = read_rows(
            config.dataset_name,
            config,
            scorer.dialog,
            display,
            limit=config.limit,
            read=read_best_of if config.benchmark in BEST_OF else None,
        )
        scorer.check_positions(longest)
        if config.benchmark is not None:
            check_benchmark(config.benchmark, rows)
        check_ordered(rows)
        with nullcontext() if folder is None else PartFile(folder / PART, identity(config, model, rows)) as part:
            steps = steps_of(config, scorer, config.sampled, part)
            with stage_of(steps, "rows", [len(row.responses) for row in rows], display) as stage:
                scored = score_rows(steps, rows, stage.advance)
            probed = attack(config, steps, rows, display) if config.probe else None
    units = Units.of(rows, config.cluster)
    report, table = make_report(scored.rows, rows, units, scorer.kind, about(config, scorer, units), config.seed)
    report = dataclasses.replace(report, tokens=dict(scored.tokens), probe=probed)
    report = with_extras(config, report, table, scored.rows, units)
    say_unread(report, sum(len(each) for row in scored.rows for each in row.verdicts))
    if config.calibrate:
        aspects = sorted({row.aspect or scorer.dialog.aspect for row in rows})
        calibrate(config, report, steps.votes, ", ".join(aspects))
    if folder is not None:  # before anything is printed, because a closed pipe may end the command there
        write(folder, report, table, scored.rows, rows, config.seed)
    show(console, report, time.monotonic() - started)
    if folder is not None:
        console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    return report.pairs


def open_folder(folder: Path) -> Path:
    """Create the folder of the report. Raises ConfigError if it holds a finished evaluation."""
    if (folder / REPORT).exists() and not (folder / PART).exists():
        raise ConfigError(f"--output_dir {folder} holds a finished evaluation: name another folder, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be made ({error.strerror}): name another folder") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output_dir {folder} cannot be written to: name another folder")
    return folder


def load(config: EvaluateConfig, model: str) -> Scorer:
    """`model`, a folder or a name, with the settings of the options. A folder without a card needs --method judge."""
    return Scorer.from_pretrained(
        model,
        method=config.method,
        template=config.template,
        enable_thinking=config.enable_thinking,
        aspect=config.aspect,
        dtype=config.dtype,
        packing=config.packing,
        token_budget=config.token_budget,
        generation_batch_size=config.generation_batch_size,
        generation_cache_gib=config.generation_cache_gib,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        **config.vllm_options,
    )


def steps_of(config: JudgingOptions, scorer: Scorer, votes: int, part: PartFile | None = None) -> Steps:
    """Steps that are just large enough to fill the sampler, so that an interruption loses little. votes: thoughts per
    response, if the model writes thoughts.
    """
    votes = votes if scorer.thinks else 1
    return Steps(scorer, votes, config.seed, max(1, config.generation_batch_size // votes), part)


def stage_of(steps: Steps, name: str, sizes: Sequence[int], display: Display) -> AbstractContextManager[Stage]:
    """The progress bar of one of STAGES. sizes: the responses of each item. An interrupted run may have done some
    already.
    """
    title, done_before = STAGES[name]
    done = steps.behind(name)
    if done:
        logger.info("resuming: %d of %d %s before", done, len(sizes), done_before)
    return display.stage(title, sum(sizes), sum(sizes[:done]))


def attack(config: EvaluateConfig, steps: Steps, rows: Sequence[Preference], display: Display) -> ProbeReport:
    """The report of the probe: every pair is scored again under each attack."""
    with stage_of(steps, "probe", [responses_each(steps.scorer)] * len(pairs_of(rows)), display) as stage:
        return probe(steps, rows, stage.advance, config.cluster)


def say_unread(report: Report, verdicts: int) -> None:
    """Warn if many verdicts could not be read: the accuracy then says little about the judge."""
    if 2 * report.pairs.unparsable > verdicts:
        logger.warning(
            "%d of %d verdicts could not be read and count as wrong: see the thoughts in scores.jsonl "
            "(--output_dir). They may be cut (raise --max_completion_length), or the model does not answer as its "
            "template asks (for a judge, try another --template).",
            report.pairs.unparsable,
            verdicts,
        )


def with_extras(
    config: EvaluateConfig, report: Report, table: PairTable, judged: Sequence[Judged], units: Units
) -> Report:
    """The report, with the optional parts that the options ask for."""
    ks = sorted({k for k in VOTE_CURVE if k < config.sampled} | {config.sampled})
    gap, weight = table.gap, table.units.weight
    temperature = fit_temperature(gap, weight) if config.calibrate else None
    benchmark = None
    if config.benchmark is not None:
        benchmark = scored_as(config.benchmark, judged, report.kind)
    return dataclasses.replace(
        report,
        votes=vote_curve(judged, report.kind, ks, config.seed, units) if config.vote_curve else [],
        benchmark=benchmark,
        temperature=temperature,
        calibrated=None if temperature is None else calibration(gap, weight, temperature),
    )


def calibrate(config: EvaluateConfig, report: Report, votes: int, aspect: str) -> None:
    """Store the fitted temperature in the model's card. votes: the thoughts per response that were scored. aspect: what
    they were asked about.
    """
    if report.temperature is None:
        logger.warning(
            "no temperature could be fitted, so none is stored: the model orders all of these pairs correctly, or "
            "not more than half of them. Give more pairs, or other pairs."
        )
        return
    folder = Path(config.model_name_or_path)
    card = load_card(folder) | {
        "calibration": {
            "temperature": report.temperature,
            "pairs": report.all.pairs,
            "data": [part.dataset_name for part in config.dataset_name],
            "votes": votes,
            "aspect": aspect,
        }
    }
    _replace(folder / CARD, json.dumps(card, indent=2) + "\n")
    logger.info("temperature %.4g is stored in %s", report.temperature, folder / CARD)


def identity(config: EvaluateConfig, model: str, rows: Sequence[Preference]) -> dict[str, Any]:
    """What must be equal for an interrupted evaluation of `model`, a folder or a name, to be resumed, as JSON."""
    later = {
        "output_dir",
        "calibrate",
        "probe",
        "vote_curve",
        "benchmark",
        "votes",
        "dataset_name",
        "model_name_or_path",
    }
    options = {name: value for name, value in config.to_dict().items() if name not in later}
    return {
        "model": config.model_name_or_path,
        "the model's files": _files(model),
        "data": [part.dataset_name for part in config.dataset_name],
        "its rows": content_hash(rows),
        "votes": config.sampled,
    } | options


def about(config: EvaluateConfig, scorer: Scorer, units: Units) -> dict[str, Any]:
    """The head of a report: what was evaluated."""
    thoughts = f"{config.sampled} sampled" if config.sampled > 1 else "one, greedy"
    return {
        "model": config.model_name_or_path,
        "method": scorer.method,
        "data": ", ".join(part.dataset_name for part in config.dataset_name),
        "rows": units.rows,
        "thoughts": thoughts if scorer.thinks else "none",
        "seed": config.seed,
    }


def show(console: Console, report: Report, seconds: float) -> None:
    """Print the headline and all tables except the bins of the reliability plot."""
    thoughts = report.about["thoughts"]
    note = "" if thoughts == "none" else f"   (thoughts: {thoughts})"
    console.print(f"accuracy {report.pairs}{note}", markup=False, highlight=False, soft_wrap=True)
    for section in sections(report):
        if section.title == "Reliability":
            continue
        table = Table(title=section.title, caption=section.note or None, title_justify="left", caption_justify="left")
        for i, name in enumerate(section.header):
            table.add_column(name, justify="left" if i == 0 or section.title == "Summary" else "right")
        for row in section.rows:
            table.add_row(*map(Text, row))
        console.print(table, highlight=False)
    console.print(f"{seconds:.0f} s", highlight=False)


def write(
    folder: Path, report: Report, table: PairTable, judged: Sequence[Judged], rows: Sequence[Preference], seed: int
) -> None:
    """scores.jsonl, report.json, report.md, report.html; the part file is removed last."""
    lines = (json.dumps(finite(line), ensure_ascii=False) + "\n" for line in by_row(judged, rows))
    _replace(folder / "scores.jsonl", "".join(lines))
    _replace(folder / "report.md", markdown(report))
    _replace(folder / "report.html", page(report, table, judged, rows, figures(report, table.gap), seed))
    _replace(folder / REPORT, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    (folder / PART).unlink(missing_ok=True)


def by_row(judged: Sequence[Judged], rows: Sequence[Preference]) -> Iterator[dict[str, Any]]:
    """The lines of scores.jsonl. `rows` belong to `judged` one by one; the pairs of one row of the file follow one
    another.
    """
    for row, some in groupby(zip(judged, rows, strict=True), lambda both: both[1].row or both[1].source):
        pairs = [one.to_dict() for one, _ in some]
        names = {"source": row} | {name: pairs[0][name] for name in ("subset", "id")}
        yield pairs[0] if len(pairs) == 1 else names | {"pairs": pairs}


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _files(model: str) -> str:
    """The identity of a model. For a folder or a GGUF file: the names, sizes and times of its files, and its card
    without the values that --calibrate stored. For a model of the hub: its name.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(model).glob("*")) if Path(model).is_dir() else [Path(model)]:
        if path.is_file() and path.name != CARD:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    if has_card(model):
        digest.update(json.dumps({k: v for k, v in load_card(model).items() if k != "calibration"}).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    command(main)
