"""The training loop: rollout batch by rollout batch, the same for every method.

A step is one rollout batch: thoughts are sampled with the current weights, then the minibatches of the batch are
trained, phase by phase. All randomness depends only on (seed, step), the feed stores its position, and a checkpoint
within a step holds its thoughts. So a run that resumes after any update continues bit for bit.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch
from dwrl_fast.compute import step_seed
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference
from dwrl_fast.data.jsonl import finite
from dwrl_fast.encode import group_record
from dwrl_fast.errors import NotFiniteError, SamplerError, Stopped
from dwrl_fast.evaluation.pairs import PairReport
from dwrl_fast.evaluation.sources import source_accuracy, source_reports
from dwrl_fast.feed import Feed
from dwrl_fast.feed.source import content_hash
from dwrl_fast.log import logger
from dwrl_fast.methods import Method
from dwrl_fast.models.pretrained import save_pretrained
from dwrl_fast.progress import Display, Stage
from dwrl_fast.scoring import Judging
from dwrl_fast.training.checkpoint import load_checkpoint, name_of
from dwrl_fast.training.first_figures import warnings
from dwrl_fast.training.identity import compare, identity
from dwrl_fast.training.in_flight import InFlight
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.policy import Minibatch, Policy
from dwrl_fast.training.resuming import found, restore_data, set_later_aside
from dwrl_fast.training.rollout import Rollout
from dwrl_fast.training.runlog import RunLog, StallWatch, thought_rows, write_bad_batch
from dwrl_fast.training.saving import Saver
from dwrl_fast.training.stopping import Stopping
from dwrl_fast.training.stopwatch import Stopwatch
from dwrl_fast.training.trackers import Trackers


class Best(NamedTuple):
    """The checkpoint with the highest held-out accuracy so far."""

    name: str
    accuracy: float


class Trainer:
    """Trains `method` on the rows of `feed`, evaluates it on `held_out`, writes into `folder` and tells `trackers`."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        judging: Judging,
        feed: Feed,
        held_out: Sequence[Preference],
        folder: Path,
        display: Display,
        trackers: Trackers | None = None,
    ):
        self.config, self.method, self.judging, self.feed, self.held_out = config, method, judging, feed, held_out
        self.folder, self.display, self.watch = folder, display, Stopwatch()
        self.trackers = trackers or Trackers()
        model, minibatches = judging.runtime.model, feed.minibatches(config.minibatch_size)
        self.policy = Policy(judging.runtime, Optimizers(model, method, config, total=minibatches))
        self.ranks = judging.runtime.ranks
        self.rollout = Rollout(method, judging, self.watch.timed)
        self.identity = identity(config, feed.identity(), feed.steps, method.dialog, self.policy.fingerprint())
        self.saver = Saver(folder, config.save_total_limit, self.ranks, beside=config.async_save)
        self.stopping = Stopping(self.ranks)
        self.step = 0  # finished steps
        self.origin: str | None = None  # the checkpoint of another folder that the run began from
        self.current: InFlight | None = None  # the step in progress
        self.skipped = 0  # updates and rollouts that were skipped
        self.best: Best | None = None
        self.began = 0.0  # start time of the step
        self.trained = self.last = 0.0  # seconds of all steps, and of the last step
        self.stall = StallWatch()
        self.before: dict[str, PairReport] = {}  # the evaluation of step 0; empty if it is unknown
        votes = [1] + [config.eval_votes] * (config.eval_votes > 1 and judging.thinks)
        self.evaluated: dict[str, Any] = {"rows": content_hash(held_out), "votes": votes}  # how it is evaluated

    def train(self) -> dict[str, Any]:
        """Run all remaining steps. Returns the entries for `result.json`."""
        self.policy.model.train()
        log, first = RunLog(self.folder, self.step) if self.ranks.first else None, self.step
        if first == 0 and self.current is None:  # after an update the weights are no longer those of step 0
            self.before = self.evaluate("before")
        if first == 0:
            self.trackers.metrics(0, accuracies(self.before))
        self.watch.restart()
        left = self._budget - self.trained
        train = self.display.stage(f"train {self.method.name}", self.feed.steps, done=self.step, most=left)
        with self.stopping, self.saver, train as stage:
            while not self._over():
                values = self.train_step(log, stage)
                if self.step == 1:
                    for line in warnings(values, self.config):
                        logger.warning("first rollout batch: %s.", line)
                if self.step == first + 1:
                    logger.info(
                        "--packing %s: the backbone computes %s tokens for sequences of %s, padding %s, head rows %s",
                        self.config.packing,
                        *(f"{values[k]:,}" for k in ("trunk_tokens", "naive_tokens", "padding", "head_rows")),
                    )
                last, best = self._over(), False
                if self.config.eval_steps and self.step % self.config.eval_steps == 0 and not last:
                    now = self.evaluate(f"step {self.step}")
                    values |= accuracies(now)
                    best = self._best(now)
                if log is not None:
                    log.metrics(self.step, values := finite(values))
                    self.trackers.metrics(self.step, values)
                self._checkpoint(last or best or _due(self.step, self.config.save_steps))
        if self.step < self.feed.steps:
            logger.info(
                "--max_minutes %g: trained for %.1f minutes, %d of %d rollout batches",
                *(self.config.max_minutes, self.trained / 60, self.step, self.feed.steps),
            )
        for source in self.feed.sources:
            logger.info(source.summary)
        after = self.evaluate("after") if self.feed.steps else {}
        self.trackers.metrics(self.step, accuracies(after), again=True)
        with self.watch.timed("save"):
            model = self.policy.runtime.whole()
            if model is not None:
                save_pretrained(self.folder / "model", model, self.method.dialog, self.method.card())
        return self._result(self.before, after)

    @property
    def _budget(self) -> float:
        """The time limit of training in seconds."""
        return math.inf if self.config.max_minutes is None else 60 * self.config.max_minutes

    def _over(self) -> bool:
        """Whether training ends before the next step."""
        return self.step >= self.feed.steps or (self.step > 0 and self.trained + self.last > self._budget)

    def train_step(self, log: RunLog | None, stage: Stage) -> dict[str, Any]:
        """One rollout batch: sample, update, and return the figures of both. log: on the first rank. Raises Stopped,
        after saving a checkpoint, if the run was asked to stop after an update that is not the last one.
        """
        self.began = time.monotonic() - (self.current.seconds if self.current else 0.0)
        self.current = current = self.current or self._roll_out()
        groups, size = current.groups, self.config.minibatch_size
        with self.watch.timed("pack"):  # packed once for all phases
            minibatches = self.policy.pack(groups, size)
        self._update_all(current, minibatches)
        means, scored = self.policy.read_metrics(groups)
        values = current.figures | means
        if len(self.feed.names) > 1:
            found = source_accuracy(scored, self.feed.names)
            values |= {f"train_accuracy/{name}": accuracy for name, accuracy in found.items()}
        if groups and self.method.thoughts_each and log is not None:
            rows = list(thought_rows(scored, self.method.dialog.tokenizer))
            log.thoughts(self.step + 1, rows)
            self.trackers.thoughts(rows)
        self.step, self.current = self.step + 1, None
        computed = self.ranks.gather(
            counters([batch for some in minibatches for batch in some.batches if batch.groups])
        )
        values |= {name: sum(each[name] for each in computed) for name in computed[0]}
        self.last = self.ranks.from_first(lambda: time.monotonic() - self.began)  # clocks of ranks differ
        self.trained += self.last
        values |= self._figures(values, current.norms, len(groups), self.last)
        self.stall.update(values, size)
        stage.advance(1, **{k: values[k] for k in ("loss", "train_accuracy", "thought_length") if k in values})
        return values

    def _roll_out(self) -> InFlight:
        """Sample the next step's thoughts. Where vLLM is lost, all before them is saved first."""
        saves = self.policy.runtime.vllm is not None and self.ranks.mesh is None and self.step > 0
        with self.watch.timed("feed"):
            before = self.feed.state() if saves else None
            rows = self.feed.next()
        with self.watch.timed("rollout"):
            try:
                return InFlight(*self.rollout(rows, step_seed(self.config.seed, "rollout", self.step), self.display))
            except NotFiniteError as error:
                self._give_up(error, f"step-{self.step + 1:06d}-rollout", {"rows": [row.content for row in rows]})
            except SamplerError:
                if before is not None:
                    self.save(before)
                raise
        return InFlight([], {})

    def _update_all(self, current: InFlight, minibatches: Sequence[Minibatch]) -> None:
        """The remaining updates of the step, with checkpoints between updates if they are due."""
        schedule = list(self._schedule(len(minibatches)))
        with self.display.stage("  update", len(schedule), done=current.done) as updating:
            for phase, m in schedule[current.done :]:
                norm = self.update(phase, minibatches[m], m)
                current.norms[phase] += [] if norm is None else [norm]
                current.done += 1
                updating.advance()
                if current.done < len(schedule):
                    self._checkpoint(_due(current.done, self.config.save_updates))

    def _schedule(self, minibatches: int) -> Iterator[tuple[str, int]]:
        phases = self.method.phases
        if self.method.phase_by_phase:
            yield from ((phase, m) for phase in phases for m in range(minibatches))
        else:
            yield from ((phase, m) for m in range(minibatches) for phase in phases)

    def update(self, phase: str, minibatch: Minibatch, index: int) -> Tensor | None:
        """One optimizer step of `phase` over a minibatch. Returns the gradient norm before clipping; None if the update
        was skipped, which --skip_bad_batches limits.
        """
        place = self.step * (self.config.rollout_batch_size // self.config.minibatch_size) + index
        with self.watch.timed(phase):
            try:
                return self.policy.update(phase, minibatch, self.method.loss, place, self.trained / self._budget)
            except NotFiniteError as error:
                record = {"phase": phase, "groups": [group_record(group) for group in minibatch.groups]}
                where = NotFiniteError(f"step {self.step + 1}, minibatch {index + 1}, {error}")
                self._give_up(where, f"step-{self.step + 1:06d}-{phase}-{index + 1:04d}", record)
        return None

    def _give_up(self, error: NotFiniteError, name: str, record: dict[str, Any]) -> None:
        """Write the batch that could not be trained and continue without it; or raise the error if no more may be
        skipped.
        """
        said = str(error)
        if self.ranks.first:
            said += write_bad_batch(self.folder, name, record | {"error": str(error)})
        self.skipped += 1
        if self.skipped > self.config.skip_bad_batches:
            raise NotFiniteError(f"{said} --skip_bad_batches N skips up to N such batches.") from None
        logger.warning("Skipped, %d of at most %d: %s", self.skipped, self.config.skip_bad_batches, said)

    def _best(self, now: dict[str, PairReport]) -> bool:
        """Whether the held-out accuracy is the highest so far. The checkpoint of that step is kept."""
        if "greedy" not in now or (self.best is not None and now["greedy"].accuracy <= self.best.accuracy):
            return False
        self.best = Best(name_of((self.step, 0)), now["greedy"].accuracy)
        return True

    def evaluate(self, name: str) -> dict[str, PairReport]:
        """Reports of the held-out pairs with one greedy thought ("greedy") and with --eval_votes sampled ones
        ("4_thoughts"); with several files also "greedy/NAME", and so on.
        """
        if not self.held_out:
            return {}
        votes = self.evaluated["votes"]
        total = len(votes) * sum(len(row.responses) for row in self.held_out)
        found: dict[str, PairReport] = {}
        with self.watch.timed("evaluate"), self.display.stage(f"evaluate {name}", total) as stage:
            for k in votes:
                groups = self.judging.score_groups(
                    self.held_out, votes=k, seed=self.config.seed, progress=stage.advance
                )
                kind = f"{k}_thoughts" if k > 1 else "greedy"
                for source, report in source_reports(groups, self.config.seed).items():
                    found[f"{kind}/{source}" if source else kind] = report
        for kind, report in found.items():
            thoughts, _, source = kind.partition("/")
            thinking = f", {thoughts.replace('_', ' ')}" if self.judging.thinks else ""
            logger.info("%s%s%s: accuracy %s", name, thinking, f", {source}" if source else "", report)
        return found

    def _figures(
        self,
        values: dict[str, float],
        norms: dict[str, list[Tensor]],
        groups: int,
        seconds: float,
    ) -> dict[str, Any]:
        """Figures derived from a step's means: norms, effective groups per minibatch, speed, and the shares of time
        since the last figures, including saving and evaluation between the steps.
        """
        found: dict[str, Any] = {
            f"grad_norm_{phase}": torch.stack(each).mean().item() for phase, each in norms.items() if each
        }
        found |= {k: n for k, n in (("skipped_batches", self.skipped), ("halved_batches", self.policy.halved)) if n}
        if "pair_weight" in values:
            size = min(self.config.minibatch_size, groups)
            weight, squared = values.pop("pair_weight"), values.pop("pair_weight_squared")
            found["effective_groups"] = size * weight**2 / squared if squared else 0.0
        found |= {f"learning_rate_{phase}": rate for phase, rate in self.policy.optimizers.last_rates.items()}
        found |= {"seconds": seconds, "tokens_per_second": values["naive_tokens"] / seconds}
        return found | {f"share_{stage}": share for stage, share in self.watch.shares().items()}

    def _result(self, before: dict[str, PairReport], after: dict[str, PairReport]) -> dict[str, Any]:
        result: dict[str, Any] = {"steps": self.step, "seconds_by_stage": dict(self.watch.seconds)} | self.feed.result()
        if self.feed.steps:
            result |= self.stall.result()
        for when, reports in (("before", before), ("after", after)):
            for kind, report in reports.items():
                suffix = kind.removeprefix("greedy") if kind.startswith("greedy") else f"_{kind}"
                result[f"accuracy_{when}{suffix}"] = report.accuracy
                result[f"report_{when}{suffix}"] = report.to_dict()
        return result

    def _checkpoint(self, due: bool) -> None:
        """Save if it is due. If the run was asked to stop, save and raise Stopped."""
        asked = self.stopping.asked()
        if due or asked:
            self.save()
        if asked:
            saved = self.saver.finish()
            if saved:
                logger.warning("Saved and stopped. Resume the run with --resume_from_checkpoint latest.")
            raise Stopped(asked, saved=saved)

    def save(self, feed: list[dict[str, Any]] | None = None) -> None:
        """A checkpoint of where the run stands, in a folder of its own. feed: its state, where it has gone further."""
        current = None
        if self.current is not None:
            metrics = self.ranks.gather(self.policy.metrics.state(self.current.groups))
            if self.ranks.first:  # all thoughts of the rollout batch: large, and written once
                current = self.current.state(metrics, time.monotonic() - self.began)
        state = {
            "step": self.step,
            "origin": self.origin,
            "current": current,
            "identity": self.identity,
            "before": {k: report.to_dict() for k, report in self.before.items()},
            "evaluated": self.evaluated,
            "seconds": dict(self.watch.seconds),
            "trained": [self.trained, self.last],
            "stall": self.stall.state(),
            "counts": [self.skipped, self.policy.halved],
            "rates": dict(self.policy.optimizers.last_rates),
            "best": list(self.best) if self.best else None,
            "feed": self.feed.state() if feed is None else feed,
        }
        place = self.step, self.current.done if self.current else 0
        with self.watch.timed("save"):
            self.saver.save(place, self.policy.state(), state, {self.best.name} if self.best else ())

    def resume(self) -> None:
        """Resume from the checkpoint that --resume_from_checkpoint names, if any: weights, optimizer, step, first
        figures.
        """
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return
        path = self.ranks.from_first(lambda: found(self.folder, wanted))
        if path is None:
            return
        state = load_checkpoint(
            path,
            self.policy.state(),
            accept=lambda state: self._accept(path, state),
            ranks=self.ranks,
        )
        self.policy.runtime.changed()
        self.ranks.from_first(lambda: set_later_aside(self.folder, path, wanted))
        self.step = state["step"]
        own = path.resolve().parent == self.folder.resolve()
        self.origin = state.get("origin") if own else str(path.resolve())
        self.watch.seconds.update(state["seconds"])
        self._restore(state)
        self._restore_evaluations(path, state)
        updates = f" and {self.current.done} updates" if self.current else ""
        logger.info("resumed %s at step %d%s of %d", path, self.step, updates, self.feed.steps)

    def _accept(self, path: Path, state: dict[str, Any]) -> None:
        """Compare the run with that of the checkpoint at `path`, and restore the position in the data, before weights
        are loaded. Raises CheckpointError if the run must not resume, and like `restore_data`.
        """
        compare(path, state["identity"], self.identity, anyway=self.config.resume_anyway)
        rows = state["identity"].get("rows", self.identity["rows"])
        batches = state["step"] + (state.get("current") is not None)
        restore_data(self.feed, path, state["feed"], batches, rows, anyway=self.config.resume_anyway)

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore entries that checkpoints of older versions may lack."""
        self.trained, self.last = state.get("trained", (0.0, 0.0))
        self.stall = StallWatch(**state.get("stall", {}))
        self.skipped, self.policy.halved = state.get("counts", (0, 0))
        self.policy.optimizers.last_rates.update(state.get("rates", {}))
        if current := state.get("current"):
            device = self.policy.runtime.compute.device
            self.current = InFlight.restored(current, device)
            for part in current["metrics"][self.ranks.rank :: self.ranks.count]:  # there may have been more ranks
                self.policy.metrics.restore(part, self.current.groups, device)

    def _restore_evaluations(self, path: Path, state: dict[str, Any]) -> None:
        """Restore the evaluations before training and of the best checkpoint, if they are of the rows and votes of this
        run. Accuracies on other rows are not comparable, and the weights of step 0 are gone.
        """
        # A checkpoint of an older version tells only whether there were held-out rows.
        known = "evaluated" in state
        if state["evaluated"] != self.evaluated if known else bool(state["before"]) != bool(self.held_out):
            logger.warning(
                "The held-out rows or --eval_votes differ from those of %s, so this run reports no accuracy before "
                "training, and chooses its best checkpoint only among later ones.",
                path,
            )
            return
        self.before = {k: PairReport.from_dict(report) for k, report in state["before"].items()}
        self.best = Best(*state["best"]) if state.get("best") else None


def accuracies(reports: Mapping[str, PairReport]) -> dict[str, float]:
    """What metrics.jsonl holds of an evaluation."""
    return {f"eval_{kind}": report.accuracy for kind, report in reports.items()}


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def counters(batches: Sequence[Batch]) -> dict[str, int]:
    """The counts of one pass over `batches`: positions in the backbone, padding among them, rows of the head; and the
    tokens of all sequences, which a pass without sharing or padding would compute.
    """
    names = ("trunk_tokens", "naive_tokens", "head_rows", "padding")
    return {name: sum(getattr(batch, name) for batch in batches) for name in names}
