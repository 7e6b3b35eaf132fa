"""`python -m dwrl_fast.plan`: predicts memory, time and cost of a training run."""

import json
from pathlib import Path

from rich.console import Console

from dwrl_fast.console import command, open_console
from dwrl_fast.errors import UnfitError
from dwrl_fast.plan import PlanConfig, Sized, load_profile, parse_plan, planned, report
from dwrl_fast.plan.sizing import changes, sized, sizes, traced_on


def main(argv: list[str]) -> None:
    """The command. Raises UnfitError if the run does not fit."""
    console = open_console()
    config = parse_plan(argv)
    if run(config, console).budget != config.token_budget:
        raise UnfitError(f"--token_budget {config.token_budget} does not fit: the lines above say what would.")


def run(config: PlanConfig, console: Console) -> Sized:
    """Print the whole plan. Returns the result for --gpus."""
    setup = planned(config, config.lengths, load_profile(config.profile))
    report.head(setup, console)
    traced = traced_on(setup, config.gpus)
    found = sized(setup, traced, config.gpus)
    report.memory_table(setup, found, console)
    report.verdict(setup, found, traced, console)
    every = sizes(setup, traced)
    report.size_table(setup, every, console)
    if found.budget != config.token_budget:
        report.say(console, "possible changes:")
        for line in changes(setup, traced, config.gpus):
            report.say(console, f"  {line}")
    if config.plot is not None:
        report.plot(setup, every, Path(config.plot))
    if config.json is not None:
        content = report.to_dict(setup, [found, *(each for each in every if each.gpus != found.gpus)])
        Path(config.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    command(main)
