"""Tests that a run that is killed after every single update equals an uninterrupted run.

Each process resumes, makes one update, and is killed by SIGKILL as soon as the next checkpoint is on disk; then the
next process continues. So 30 rollout batches need as many processes as updates. The state after every update is
compared: weights, optimizer, random generators, gradient norm, and the ids and old log-probs of the batch; at the end
also metrics and thoughts.
"""

import json
import signal
from pathlib import Path
from typing import Any

from bench.reliability.drill import Drill
from bench.reliability.lives import die, lived
from bench.reliability.task import CASES, digest, random_state, run, small, written
from dwrl_fast.config import TrainConfig
from dwrl_fast.embedded import Embedded
from dwrl_fast.encode import group_record
from dwrl_fast.training.saving import Saver
from dwrl_fast.training.trainer import Trainer

LIVES = 1000  # upper limit, in case a run makes no progress


def traced(config: TrainConfig, trace: Path, *, deadly: bool) -> None:
    """The run. Writes a line to `trace` with the state after each update. deadly: it dies after its first
    checkpoint.
    """
    update, save = Trainer.update, Saver.save

    def watched(self: Trainer, phase: str, minibatch: Any, index: int) -> Any:
        norm = update(self, phase, minibatch, index)
        assert self.current is not None and norm is not None
        groups = [group_record(group) for group in self.current.groups]
        found = {
            "place": [self.step, self.current.done + 1],
            "phase": phase,
            "norm": norm.item(),
            "state": digest(self.policy.state()),
            "random": random_state(),
            "batch": hash(json.dumps(groups)),  # equal in processes forked from the same one
            "row": [group["row"]["source"] for group in groups],
        }
        with trace.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        return norm

    def fatal(self: Saver, *arguments: Any) -> None:
        save(self, *arguments)
        assert self.finish()
        die()

    setattr(Trainer, "update", watched)  # noqa: B010 - mypy takes no assignment to a method
    if deadly:
        setattr(Saver, "save", fatal)  # noqa: B010
    run(config)


def resumed_everywhere(task: Embedded, folder: Path, case: str, **changes: Any) -> Drill:
    """The drill of one of CASES, in `folder`."""
    folder.mkdir(parents=True)
    names, options = ("whole", "killed"), CASES[case] | changes
    traces = {name: folder / f"{name}.jsonl" for name in names}
    unsaved = small(task, folder / "whole", **options | {"save_steps": 0, "save_updates": 0})
    saved = small(task, folder / "killed", **options)
    assert lived(lambda: traced(unsaved, traces["whole"], deadly=False), folder / "whole.log") == 0
    kills = 0
    while (end := lived(lambda: traced(saved, traces["killed"], deadly=True), folder / "killed.log")) != 0:
        assert end == -signal.SIGKILL, f"status {end}: see {folder / 'killed.log'}"
        kills += 1
        assert kills < LIVES, "the run makes no progress"
    whole, killed = ([json.loads(line) for line in path.read_text().splitlines()] for path in traces.values())
    one, other = written(folder / "whole"), written(folder / "killed")
    steps = [name for name in one if name.startswith("step ")]
    same = [
        name for name in steps
        if one[name] == other.get(name) and _of(whole, name) == _of(killed, name)
    ]  # fmt: skip
    held = len(same) == len(steps) and whole == killed and one == other and kills >= len(whole)
    return Drill(
        f"resume after every update: {case}",
        "30 of 30 steps equal bit for bit",
        f"{len(same)} of {len(steps)} steps, {len(whole)} updates, {kills} processes ended by SIGKILL",
        held,
    )


def _of(trace: list[dict[str, Any]], step: str) -> list[dict[str, Any]]:
    return [line for line in trace if line["place"][0] + 1 == int(step.removeprefix("step ").split(".")[0])]
