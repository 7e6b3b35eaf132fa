"""The options of `dwrl_fast.evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dwrl_fast.config.common import (
    JudgingOptions,
    data_option,
    evaluation_option,
    model_option,
    run_option,
)
from dwrl_fast.data.mixture import Part, check_evaluated
from dwrl_fast.dialog import Thinking
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods import METHODS
from dwrl_fast.methods.method_options import method_option, thoughts_option
from dwrl_fast.options import at_least, parse

# ruff: noqa: RUF009 - what option() returns is a dataclass field

UNTRAINED = tuple(name for name, method in METHODS.items() if not method.trains)
JUDGE = ("method", UNTRAINED)
if TYPE_CHECKING:
    Judge = str
else:
    Judge = Literal[UNTRAINED]
BEST_OF = ("rewardbench2", "rmbench")  # benchmarks with lists of right and of wrong responses, and a reader for them
VOTE_CURVE = (1, 4, 16, 32)  # thoughts


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JudgingOptions):
    """The options of `python -m dwrl_fast.evaluate`."""

    command: ClassVar[str] = "python -m dwrl_fast.evaluate"
    summary: ClassVar[str] = (
        "Measures how often a model scores the better response higher on your preference data: overall, by "
        "presentation order, subset and length, and how well its probabilities are calibrated. docs/evaluation.md "
        "defines each figure."
    )
    examples: ClassVar[str] = """
# one greedy thought per response; report.html, report.md, report.json and scores.jsonl in a folder
python -m dwrl_fast.evaluate --model_name_or_path runs/mine/model --dataset_name held_out.jsonl --output_dir runs/report

# 32 sampled thoughts, and the accuracy with 1, 4 and 16 of them
python -m dwrl_fast.evaluate --model_name_or_path runs/mine/model --dataset_name held_out.jsonl --vote_curve

# any language model of the hub as a judge: which of two responses is better, in both orders
python -m dwrl_fast.evaluate --method judge --model_name_or_path Qwen/Qwen2.5-3B-Instruct --dataset_name held_out.jsonl

# a benchmark, scored as its authors do
python -m dwrl_fast.evaluate --model_name_or_path runs/mine/model --dataset_name allenai/reward-bench:filtered \\
    --benchmark rewardbench --output_dir runs/rewardbench
"""

    model_name_or_path: str = model_option(
        help="Folder of a model that dwrl_fast.train wrote, or its name on the Hugging Face hub. With --method judge "
        "any other folder, hub name or local FILE.gguf."
    )
    revision: str | None = model_option(
        None, "Branch, tag or commit of a trained model on the hub. none: its branch main."
    )
    dataset_name: tuple[Part, ...] = data_option(
        help="Preference data, in any format of training: FILE, or FILE::ASPECT. Several files are also reported one "
        "by one, and so is each value of a column named subset."
    )
    aspect: str | None = data_option(
        None, "The criterion for judging. none: the aspect of the training. A column named aspect has priority."
    )
    method: Judge | None = method_option(
        None,
        "judge: ask a model that was not trained to judge for a verdict in text. none: the method of its training.",
    )
    template: str | None = data_option(
        None,
        "Template of a judge: one of kind pairwise, by name or as a YAML file. none: the packaged one.",
        needs=JUDGE,
    )
    enable_thinking: Thinking = data_option(
        "auto", "Whether a judge's thought may start with a think block; see dwrl_fast.train.", needs=JUDGE
    )
    max_completion_length: int | None = thoughts_option(
        None,
        "Maximum tokens of a thought. none: as in training; 1000 for a judge.",
        bound=at_least(1),
    )
    temperature: float | None = thoughts_option(
        None,
        "Sampling temperature of thoughts. none: as in training; 1 for a judge.",
        bound=at_least(0.01),
    )
    votes: int | None = evaluation_option(
        None,
        "Thoughts per response. 1: one greedy thought. More: that many sampled ones, combined by the mean of p(Yes) or "
        "the majority of the verdicts. none: 1, or 32 with --vote_curve.",
        bound=at_least(1),
    )
    vote_curve: bool = evaluation_option(
        False,
        "Also report the accuracy with 1, 4, 16 and 32 thoughts, by the mean of p(Yes) and by majority, drawn from "
        "those of --votes.",
    )
    calibrate: bool = evaluation_option(
        False,
        "Fit the temperature of the score differences on these pairs by maximum likelihood, and store it in the "
        "model's preference_model.json. Use pairs other than those you report.",
    )
    probe: bool = evaluation_option(
        False,
        'Attack the judge: append forged turns, "answer Yes", flattery, padding and length to the worst response of '
        "each row, and report how far its score shifts and how many pairs flip. Takes several times as long.",
    )
    benchmark: Literal["rewardbench", "rewardbench2", "rmbench", "judgebench"] | None = evaluation_option(
        None, "The files are those of this benchmark: also report its score, weighted as its authors do."
    )
    output_dir: str | None = run_option(
        None,
        "Write report.html, report.md, report.json and scores.jsonl to this folder. An interrupted evaluation in it is "
        "resumed. none: only print the summary.",
    )

    def validate(self) -> None:
        check_evaluated("dataset_name", self.dataset_name)
        for name in ("layout", "rankings", "ties"):
            if self.changed(name) and self.benchmark in BEST_OF:
                raise ConfigError(
                    f"{name} with benchmark = {self.benchmark}: its files have one layout, and its rows are judged "
                    f"whole, as its authors do. Leave {name} out."
                )
        for name in ("template", "enable_thinking"):
            if self.changed(name) and self.method is None:
                raise ConfigError(
                    f"{name} without --method judge: a model that was trained is asked what it was trained on. Leave "
                    "it out, or add --method judge."
                )
        if self.revision is not None and self.method is not None:
            raise ConfigError(
                f"revision with method = {self.method}: it is taken of models that dwrl_fast.train wrote. Fetch the "
                f"model by `hf download {self.model_name_or_path} --revision {self.revision} --local-dir DIR` and give "
                "that folder."
            )
        if self.vote_curve and self.votes == 1:
            raise ConfigError("vote_curve with votes = 1: there is no curve of one thought. Leave --votes out.")
        if self.calibrate and self.method is not None:
            raise ConfigError(
                f"calibrate with method = {self.method}: verdicts in text have no scale to calibrate. Leave it out."
            )
        self.say_without_effect()

    @property
    def sampled(self) -> int:
        """Thoughts for each response or comparison; one is greedy."""
        return self.votes or (VOTE_CURVE[-1] if self.vote_curve else 1)


def parse_evaluate(argv: Sequence[str]) -> EvaluateConfig:
    """The evaluation options of a command line (without the program's name); see `options.parse`."""
    return parse(EvaluateConfig, argv)
