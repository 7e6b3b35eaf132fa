"""`python -m dwrl_fast.compare A B`: compares two trained models on the same pairs and lists their disagreements."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from dwrl_fast.config import JudgingOptions
from dwrl_fast.console import command, open_console
from dwrl_fast.data import Preference, Reader, open_rows
from dwrl_fast.data.jsonl import finite
from dwrl_fast.data.mixture import Part, check_evaluated
from dwrl_fast.data.printing import say
from dwrl_fast.dialog import DEFAULT_ASPECT, named_aspect
from dwrl_fast.dialog.single_turn import transcript
from dwrl_fast.errors import ConfigError, DataError
from dwrl_fast.evaluate import steps_of
from dwrl_fast.evaluation.escaping import block, inline
from dwrl_fast.evaluation.judged import Judged, judged_report, score_table
from dwrl_fast.evaluation.paired import PairedReport, disagreements, paired_report
from dwrl_fast.evaluation.pairs import check_ordered
from dwrl_fast.evaluation.scoring import score_rows
from dwrl_fast.evaluation.units import Units
from dwrl_fast.feed import read_rows
from dwrl_fast.log import logger
from dwrl_fast.models.hub import judge_folder, on_hub
from dwrl_fast.models.pretrained import load_card
from dwrl_fast.options import at_least, option, parse
from dwrl_fast.progress import Display
from dwrl_fast.scoring.scorer import Scorer

_model = partial(option, group="Model")
_data = partial(option, group="Data")
_evaluation = partial(option, group="Evaluation")
FORMATS = (".jsonl", ".md")

Judgements = dict[str, tuple[Preference, Judged]]  # by the row's source
Difference = tuple[Preference, tuple[Judged, Judged]]  # a row, with the judgements of both models


@dataclass(frozen=True, kw_only=True)
class CompareConfig(JudgingOptions):
    """The options of `python -m dwrl_fast.compare`."""

    command: ClassVar[str] = "python -m dwrl_fast.compare A B"
    summary: ClassVar[str] = (
        "Compares two trained models on the same preference data: the accuracy of each, the difference with a paired "
        "bootstrap interval, McNemar's exact test, and how often they agree. On request it writes the disagreements. "
        "The models may be of different methods; one is in memory at a time."
    )
    examples: ClassVar[str] = """
# is the second run better, or is it chance?
python -m dwrl_fast.compare runs/new/model runs/old/model --dataset_name held_out.jsonl

# write the disagreements, with the thoughts of both
python -m dwrl_fast.compare runs/dwrl/model runs/bt/model --dataset_name held_out.jsonl --output_file differ.md
"""

    model_a: str = _model(
        help="Folder of the first model, which dwrl_fast.train wrote, or its name on the Hugging Face hub. Also as the "
        "first argument, A."
    )
    model_b: str = _model(help="Folder of the second model. Also as the second argument, B.")
    dataset_name: tuple[Part, ...] = _data(
        help="Preference data, in any format of training: FILE, or FILE::ASPECT. Rows that one of the models cannot "
        "read are left out for both, and counted."
    )
    aspect: str | None = _data(
        None,
        "The criterion for judging. none: the aspect of the training. A column named aspect has priority.",
    )
    votes: int = _evaluation(
        1, "Thoughts per response. 1: one greedy thought. More: that many sampled ones.", bound=at_least(1)
    )
    output_file: str | None = option(
        None,
        "Write the disagreements to this file, the largest difference of probabilities first, with thoughts and "
        "scores of both: FILE.md to read, FILE.jsonl with one line per pair or ranking. An existing file is not "
        "overwritten.",
        group="Run",
    )

    def validate(self) -> None:
        """Raises ConfigError if a file is named twice or has a weight, or if the output file cannot be created."""
        check_evaluated("dataset_name", self.dataset_name)
        self.say_without_effect()
        if self.output_file is None:
            return
        path = Path(self.output_file)
        if path.suffix not in FORMATS:
            raise ConfigError(f"output_file = {path}: its name must end with {' or '.join(FORMATS)}")
        self.check_new_files("output_file")


def parse_compare(argv: Sequence[str]) -> CompareConfig:
    """The options of a command line. Its first two arguments may be the models."""
    named = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    models = argv[:named]
    if len(models) not in (0, 2):
        raise ConfigError(
            f"expected two models before the options, found {len(models)}: python -m dwrl_fast.compare A B "
            "--dataset_name FILE"
        )
    given = [part for name, model in zip(("a", "b"), models, strict=False) for part in (f"--model_{name}", model)]
    return parse(CompareConfig, [*given, *argv[named:]])


def main(argv: list[str]) -> None:
    """The command."""
    console = open_console()
    run(parse_compare(argv), console)


def run(config: CompareConfig, console: Console) -> PairedReport:
    """Score the rows with one model after the other, and print both reports and their comparison. With --output_file,
    write the rows on which one model is better.
    """
    # A missing card is an error before the first model runs.
    cards = [load_card(judge_folder(path)) for path in (config.model_a, config.model_b)]
    if config.aspect is None:
        check_aspects(config, *(named_aspect({"aspect": DEFAULT_ASPECT} | card.get("dialog", {})) for card in cards))
    if config.output_file is not None:
        open(config.output_file, "x").close()  # the same holds for an output file that cannot be written
        Path(config.output_file).unlink()
    with Display(console) as display:
        both = [_judge(config, path, display) for path in (config.model_a, config.model_b)]
    rows, first, second = _shared(*both)
    units = Units.of(rows, config.cluster)
    for name, model, judgements in (("A", config.model_a, first), ("B", config.model_b, second)):
        say(console, f"{name}  {model}: accuracy {judged_report(judgements, config.seed, units)}")
    scores = score_table(first), score_table(second)
    ranks = [judgement.ranks for judgement in first]
    report = paired_report(*scores, ranks=ranks, seed=config.seed, units=units)
    say(console, f"A - B: {report}")
    differ = [(rows[i], (first[i], second[i])) for i in disagreements(*scores, ranks=ranks)]
    if config.output_file is not None:
        write = _markdown if config.output_file.endswith(".md") else _json_lines
        with open(config.output_file, "x", encoding="utf-8") as file:
            file.writelines(write(differ, config))
        say(console, f"{len(differ)} disagreements: {config.output_file}")
    return report


def check_aspects(config: CompareConfig, a: str | None, b: str | None) -> None:
    """Raise ConfigError if models for which the aspects `a` and `b` were named (None: no aspect) would be compared with
    different labels, because a file has scores by aspect. Raises DataError if one of them cannot read the first row.
    """
    for part in config.dataset_name if a != b else ():
        if part.aspect is not None:
            continue
        readers = [
            Reader(
                open_rows(part.dataset_name),
                columns=config.columns,
                ties=config.ties,
                consecutive=True,
                layout=config.layout,
                aspect=aspect,
            )
            for aspect in (a, b)
        ]
        for reader in readers:
            first = next((each for each in reader.read() if each.error or each.preferences), None)
            if first is not None and first.error is not None:
                raise first.error
        read = [f"the scores of {reader.scored_by}" if reader.scored_by else "the overall scores" for reader in readers]
        if read[0] != read[1]:
            raise ConfigError(
                f"aspect: {part.dataset_name} has scores by aspect. By the aspects of their training, A would be "
                f"compared with {read[0]}, and B with {read[1]}. Name the aspect to compare by: --aspect "
                f"{' or '.join(readers[0].aspects)}"
            )


def _judge(config: CompareConfig, model: str, display: Display) -> Judgements:
    """The judgements of one model, by the source of the row, for the rows that it can read. Frees the model at the
    end.
    """
    scorer = Scorer.from_pretrained(
        model,
        aspect=config.aspect,
        dtype=config.dtype,
        packing=config.packing,
        token_budget=config.token_budget,
        generation_batch_size=config.generation_batch_size,
        generation_cache_gib=config.generation_cache_gib,
        **config.vllm_options,
    )
    rows, longest = read_rows(config.dataset_name, config, scorer.dialog, display, limit=config.limit)
    scorer.check_positions(longest)
    check_ordered(rows)
    steps = steps_of(config, scorer, config.votes)
    name = model if on_hub(model) else Path(model).parent.name
    with display.stage(f"score {name}", sum(len(row.responses) for row in rows)) as stage:
        found, _ = score_rows(steps, rows, stage.advance)
    return {row.source: (row, judgement) for row, judgement in zip(rows, found, strict=True)}


def _shared(a: Judgements, b: Judgements) -> tuple[list[Preference], list[Judged], list[Judged]]:
    """The rows that both models can read, with the judgements of the first and of the second model."""
    found = [source for source in a if source in b]
    if not found:
        raise DataError(
            "no row can be read by both models: raise --max_length, or see above which rows each model left out"
        )
    for name, mine in (("A", a), ("B", b)):
        if len(found) < len(mine):
            logger.info("%d pairs or rankings are left out because only %s can read them", len(mine) - len(found), name)
    return [a[source][0] for source in found], [a[source][1] for source in found], [b[source][1] for source in found]


def _json_lines(differ: Sequence[Difference], config: CompareConfig) -> Iterator[str]:
    for row, models in differ:
        line: dict[str, Any] = {
            "source": row.source,
            "prompt": row.prompt,
            "responses": row.responses,
            "ranks": models[0].ranks,
        }
        for name, found in zip(("a", "b"), models, strict=True):
            line[name] = {"scores": finite(found.scores), "thoughts": found.thoughts}
            line[name] |= {"comparisons": found.comparisons} if found.comparisons else {}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _markdown(differ: Sequence[Difference], config: CompareConfig) -> Iterator[str]:
    yield f"# {len(differ)} disagreements\n\nA: {inline(config.model_a)}  \nB: {inline(config.model_b)}\n"
    for row, models in differ:
        yield f"\n## {inline(row.source)}\n\n{block(transcript(row.prompt))}"
        for k, response in enumerate(row.responses):
            scores = ", ".join(f"{name} {found.scores[k]:.4f}" for name, found in zip("AB", models, strict=True))
            yield f"\n**Response {k + 1}** (rank {models[0].ranks[k]}; {scores})\n\n{block(response)}"
        for name, found in zip("AB", models, strict=True):
            shown = [f"responses {i + 1} and {j + 1}" for i, j in found.comparisons]
            about = shown or [f"response {k + 1}" for k in range(len(row.responses))]
            for what, thoughts in zip(about, found.thoughts, strict=False):  # some methods write no thoughts
                for thought in thoughts:
                    yield f"\n{name} on {what}:\n\n{block(thought)}"


if __name__ == "__main__":
    command(main)
