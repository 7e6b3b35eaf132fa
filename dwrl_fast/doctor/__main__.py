"""`python -m dwrl_fast.doctor`: finds faults in a setup before training."""

import dataclasses
import json
import time
from pathlib import Path

from rich.console import Console

from dwrl_fast.compute import Compute, one_thread
from dwrl_fast.console import command, open_console
from dwrl_fast.data.printing import say
from dwrl_fast.doctor import DoctorConfig, Report, embedded_task, examine, parse_doctor
from dwrl_fast.doctor.profile import measured, told
from dwrl_fast.embedded.options import on_embedded
from dwrl_fast.errors import UnfitError
from dwrl_fast.progress import Display
from dwrl_fast.ranks import ALONE, Ranks, start


def main(argv: list[str]) -> None:
    """The command. Raises UnfitError if a line of the report fails."""
    console = open_console()
    config = parse_doctor(argv)
    report = run(config, console, start(config.ddp_timeout, hsdp=config.hsdp))
    failed = report.named("fail")
    if failed:
        raise UnfitError(f"failed: {', '.join(failed)}. The lines above say what to do. Then run the doctor again.")


def run(config: DoctorConfig, console: Console, ranks: Ranks = ALONE) -> Report:
    """Examine the setup and print the report line by line."""
    started, report = time.monotonic(), Report(console, ranks)
    config = dataclasses.replace(config, output_dir=None, resume_from_checkpoint=None)  # nothing is written there
    with Display(console) as display:
        if config.own_data:
            head(config, f"{config.model_name_or_path or config.model_config}", console, ranks)
            examine(config, report, display, ranks)
        else:
            with one_thread(), embedded_task(config, display, ranks) as (made, which):
                config = on_embedded(config, made)
                head(config, f"the embedded model ({which})", console, ranks)
                examine(config, report, display, ranks)
    if config.profile is not None:
        found = measured(Compute.resolve(config.dtype), ranks)
        report.add(told(found, config.profile))
        if ranks.first:
            Path(config.profile).write_text(found.to_yaml(), encoding="utf-8")
    seconds = time.monotonic() - started
    say(console, f"{report.summary}   {seconds:.0f} s")
    if config.json is not None and ranks.first:
        content = {"options": config.to_dict(), "ranks": ranks.count, "seconds": seconds} | report.to_dict()
        Path(config.json).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    ranks.gather(None)  # no rank ends while the first still writes
    return report


def head(config: DoctorConfig, model: str, console: Console, ranks: Ranks) -> None:
    """Print what is examined."""
    data = config.dataset_name or ", ".join(
        part.dataset_name for part in config.dataset_mixture or config.eval_dataset_name
    )
    processes = f"; {ranks.count} ranks" if ranks.mesh is not None else ""
    say(console, f"{config.method} on {model}; up to {config.limit} rows of {data}{processes}")


if __name__ == "__main__":
    command(main, ranks=True)
