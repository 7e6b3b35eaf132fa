"""Scores rows step by step, so that an interrupted evaluation can be resumed, and counts the computed tokens."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.errors import ConfigError
from dwrl_fast.evaluation.judged import Judged, judged
from dwrl_fast.lock import hold
from dwrl_fast.scoring import Progress, ScoredGroup
from dwrl_fast.scoring.scorer import Scorer

Item = TypeVar("Item")
Score = Callable[[Sequence[Preference]], list[ScoredGroup]]


@dataclass(frozen=True, slots=True)
class Found:
    """The results of the steps of one stage: a JSON value per item, and the token counts `computed` and `naive`."""

    results: list[Any] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)

    def add(self, results: Sequence[Any], tokens: Mapping[str, int]) -> None:
        """Add the results of one step."""
        self.results.extend(results)
        self.tokens.update(tokens)


class PartFile:
    """The file of an unfinished evaluation, one line per step: {"stage", "results", "tokens"}. The first line holds the
    identity of the evaluation. Use it as a context manager: until it ends, no other process can continue the same
    evaluation.

    `done` holds the results of an interrupted evaluation, by stage. Raises ConfigError if that evaluation had a
    different model, file or options, or if it is still running.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.done: defaultdict[str, Found] = defaultdict(Found)
        self._file = path.open("a+b")
        try:
            hold(self._file, path.parent, "its evaluation")
            self._take_up(path, json.loads(json.dumps(identity)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, stage: str, results: Sequence[Any], tokens: Mapping[str, int]) -> None:
        """Write one step of `stage`."""
        self._append({"stage": stage, "results": results, "tokens": tokens})

    def _take_up(self, path: Path, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        whole, newline, _ = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole + newline))  # a killed run may leave an incomplete line
        if not newline:
            self._append(identity)
            return
        for number, line in enumerate(whole.split(b"\n"), 1):
            try:
                saved = dict(json.loads(line))
                if number > 1:
                    self.done[saved["stage"]].add(saved["results"], saved["tokens"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{path}, line {number}, is not a step of an unfinished evaluation: remove the file to start "
                    "again, or name another --output_dir"
                ) from None
            if number == 1:
                _refuse_other(path, saved, identity)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


@dataclass(frozen=True, slots=True)
class Steps:
    """Goes through the rows of an evaluation, `size` rows at a time, after those that `part` already holds.

    The random draws of a thought depend on the seed, the stage and its text, not on the step. So a resumed run, or one
    with a different step size, gives the same result.
    """

    scorer: Scorer
    votes: int = 1
    seed: int = 0
    size: int = 256
    part: PartFile | None = None

    def behind(self, stage: str) -> int:
        """The number of items of `stage` that an interrupted run has done."""
        return 0 if self.part is None else len(self.part.done[stage].results)

    def through(
        self,
        stage: str,
        items: Sequence[Item],
        work: Callable[[Sequence[Item], Score], list[Any]],
        *,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> Found:
        """The results of `work` for all `items`. work: takes some items and a function that scores rows, and returns a
        JSON value per item.
        """
        found = Found() if self.part is None else self.part.done[stage]
        size = size or self.size
        for start in range(len(found.results), len(items), size):
            score = partial(
                self.scorer.score_groups,
                votes=self.votes,
                seed=step_seed(self.seed, stage, 0),
                progress=progress,
            )
            before = Counter(self.scorer.tokens)
            results = work(items[start : start + size], score)
            tokens = self.scorer.tokens - before
            if self.part is not None:
                self.part.add(stage, results, tokens)
            found.add(results, tokens)
        return found


class Scored(NamedTuple):
    """tokens: `computed`, and `naive` (without sharing)."""

    rows: list[Judged]
    tokens: Counter[str]


def score_rows(steps: Steps, rows: Sequence[Preference], progress: Progress | None = None) -> Scored:
    """The model's judgement of each of `rows`. `progress` counts responses."""

    def work(some: Sequence[Preference], score: Score) -> list[Any]:
        return [row.to_dict() for row in judged(steps.scorer, score(some))]

    found = steps.through("rows", rows, work, progress=progress)
    return Scored([Judged.from_dict(row) for row in found.results], found.tokens)


def _refuse_other(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [f"{name} was {was.get(name)}, is {now.get(name)}" for name in now if was.get(name) != now[name]]
    if changed:
        raise ConfigError(
            f"{path.parent} holds an unfinished evaluation of another kind: {'; '.join(changed)}. Name another "
            f"--output_dir, or remove {path.name} to start again."
        )
