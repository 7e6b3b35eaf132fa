"""The training loop: rollout batch by rollout batch, the same for every method.

A step is one rollout batch: thoughts are sampled with the weights as they stand, then the batch's minibatches are
trained, each phase in turn. All that is random depends on (seed, step) alone and the feed knows where it stands, so a
run that resumes at a step boundary goes on to the bit.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch
from dwrl_fast.compute import step_seed
from dwrl_fast.config import NEWEST, TrainConfig
from dwrl_fast.data import Preference
from dwrl_fast.data.jsonl import finite
from dwrl_fast.errors import CheckpointError, NotFiniteError
from dwrl_fast.evaluation.pairs import PairReport
from dwrl_fast.evaluation.sources import source_accuracy, source_reports
from dwrl_fast.feed import Feed
from dwrl_fast.log import logger
from dwrl_fast.methods import Method
from dwrl_fast.methods.method_options import VllmOptions
from dwrl_fast.models.pretrained import save_pretrained
from dwrl_fast.options import option_fields
from dwrl_fast.progress import Display, Stage
from dwrl_fast.scoring import Judging
from dwrl_fast.training.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint, set_aside
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.policy import Minibatch, Policy
from dwrl_fast.training.rollout import Rollout
from dwrl_fast.training.runlog import RunLog, StallWatch

# Options that say where a run reads and writes; its rows and its dialog are compared by content.
APART = {
    *("explicit", "output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "eval_steps", "eval_votes"),
    *(
        "eval_dataset_name",
        "dataset_name",
        "dataset_mixture",
        "columns",
        "layout",
        "max_length",
        "aspect",
        "model_name_or_path",
    ),
    *("model_config", "tokenizer_name_or_path", "num_train_epochs", "max_steps", "gradient_checkpointing"),
    *("ddp_timeout", "cpu_offload", "reshard_after_backward", "hsdp"),
}
# Options that may be mended on the way: the run goes on, to other figures.
TUNABLE = {
    *("learning_rate", "score_learning_rate", "thought_learning_rate", "max_grad_norm", "dtype", "packing"),
    *("token_budget", "generation_batch_size", "generation_cache_gib", "old_logprobs", "max_minutes"),
    *(f.name for f in option_fields(VllmOptions)),
}


class Trainer:
    """Trains `method` on the rows of `feed`, evaluates it on `held_out`, and writes into `folder`."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        judging: Judging,
        feed: Feed,
        held_out: Sequence[Preference],
        folder: Path,
        display: Display,
    ):
        self.config, self.method, self.judging, self.feed, self.held_out = config, method, judging, feed, held_out
        self.folder, self.display = folder, display
        model, minibatches = judging.runtime.model, feed.minibatches(config.minibatch_size)
        self.policy = Policy(judging.runtime, Optimizers(model, method, config, total=minibatches))
        self.ranks = judging.runtime.ranks
        self.rollout = Rollout(method, judging, self.timed)
        self.rows_identity = feed.identity()
        self.step = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.trained = self.last = 0.0  # seconds of all steps, and of the last one
        self.figured = time.monotonic(), dict(self.seconds)  # when the last figures were taken
        self.inner = [0.0]  # seconds that belong to stages within the open ones, from the outermost
        self.stall = StallWatch()
        self.before: dict[str, PairReport] = {}

    def train(self) -> dict[str, Any]:
        """Every step from where the run stands. Returns what `result.json` holds of it."""
        self.policy.model.train()
        log, first = RunLog(self.folder, self.step) if self.ranks.first else None, self.step
        self.before = self.before or self.evaluate("before")
        self.figured = time.monotonic(), dict(self.seconds)
        with self.display.stage(f"train {self.method.name}", self.feed.steps, done=self.step) as stage:
            while not self._over():
                values = self.train_step(log, stage)
                if self.step == first + 1:
                    logger.info(
                        "--packing %s: the backbone computes %s tokens for sequences of %s, padding %s, head rows %s",
                        self.config.packing,
                        *(f"{values[k]:,}" for k in ("trunk_tokens", "naive_tokens", "padding", "head_rows")),
                    )
                last = self._over()
                if self.config.eval_steps and self.step % self.config.eval_steps == 0 and not last:
                    now = self.evaluate(f"step {self.step}")
                    values |= {f"eval_{k}": report.accuracy for k, report in now.items()}
                if log is not None:
                    log.metrics(self.step, finite(values))
                if last or (self.config.save_steps and self.step % self.config.save_steps == 0):
                    self.save()
        if self.step < self.feed.steps:
            logger.info(
                "--max_minutes %g: trained for %.1f minutes, %d of %d rollout batches",
                *(self.config.max_minutes, self.trained / 60, self.step, self.feed.steps),
            )
        for source in self.feed.sources:
            logger.info(source.summary)
        after = self.evaluate("after") if self.feed.steps else {}
        with self.timed("save"):
            model = self.policy.runtime.whole()
            if model is not None:
                save_pretrained(self.folder / "model", model, self.method.dialog, self.method.card())
        return self._result(self.before, after)

    @property
    def _budget(self) -> float:
        """Seconds that may be trained."""
        return math.inf if self.config.max_minutes is None else 60 * self.config.max_minutes

    def _over(self) -> bool:
        """Whether no further step is to begin."""
        return self.step == self.feed.steps or (self.step > 0 and self.trained + self.last > self._budget)

    def train_step(self, log: RunLog | None, stage: Stage) -> dict[str, Any]:
        """One rollout batch: sample, update, and the figures of both. log: of the first rank."""
        started = time.monotonic()
        with self.timed("feed"):
            rows = self.feed.next()
        with self.timed("rollout"):
            groups, values = self.rollout(rows, step_seed(self.config.seed, "rollout", self.step), self.display)
        norms, size = defaultdict(list), self.config.minibatch_size
        with self.timed("pack"):  # once for all phases
            minibatches = self.policy.pack(groups, size)
        with self.display.stage("  update", len(minibatches) * len(self.method.phases)) as updating:
            for phase, m in self._schedule(len(minibatches)):
                norms[phase].append(self.update(phase, minibatches[m], m))
                updating.advance()
        means, scored = self.policy.read_metrics(groups)
        values |= means
        if len(self.feed.names) > 1:
            found = source_accuracy(scored, self.feed.names)
            values |= {f"train_accuracy/{name}": accuracy for name, accuracy in found.items()}
        if groups and self.method.thoughts_each and log is not None:
            log.thoughts(self.step + 1, scored, self.method.dialog.tokenizer)
        self.step += 1
        computed = self.ranks.gather(
            counters([batch for some in minibatches for batch in some.batches if batch.groups])
        )
        values |= {name: sum(each[name] for each in computed) for name in computed[0]}
        self.last = self.ranks.from_first(lambda: time.monotonic() - started)  # clocks differ
        self.trained += self.last
        values |= self._figures(values, norms, len(groups), self.last)
        self.stall.update(values, size)
        stage.advance(1, **{k: values[k] for k in ("loss", "train_accuracy", "thought_length") if k in values})
        return values

    def _schedule(self, minibatches: int) -> Iterator[tuple[str, int]]:
        phases = self.method.phases
        if self.method.phase_by_phase:
            yield from ((phase, m) for phase in phases for m in range(minibatches))
        else:
            yield from ((phase, m) for m in range(minibatches) for phase in phases)

    def update(self, phase: str, minibatch: Minibatch, index: int) -> Tensor:
        """One optimizer step of `phase` over a minibatch; the gradient's norm before clipping."""
        place = self.step * (self.config.rollout_batch_size // self.config.minibatch_size) + index
        with self.timed(phase):
            try:
                return self.policy.update(phase, minibatch, self.method.loss, place, self.trained / self._budget)
            except NotFiniteError as error:
                raise NotFiniteError(f"step {self.step + 1}, minibatch {index + 1}, {error}") from None

    def evaluate(self, name: str) -> dict[str, PairReport]:
        """Reports of the held-out pairs with one greedy thought ("greedy") and with --eval_votes sampled ones
        ("4_thoughts"); of several files also "greedy/NAME", and so on.
        """
        if not self.held_out:
            return {}
        votes = [1] + [self.config.eval_votes] * (self.config.eval_votes > 1 and self.judging.thinks)
        total = len(votes) * sum(len(row.responses) for row in self.held_out)
        found: dict[str, PairReport] = {}
        with self.timed("evaluate"), self.display.stage(f"evaluate {name}", total) as stage:
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

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time within it, but for that of stages within, to that of `stage`."""
        started = time.monotonic()
        self.inner.append(0.0)
        try:
            yield
        finally:
            within = self.inner.pop()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        self.inner[-1] += seconds
        self.seconds[stage] += seconds - within

    def _figures(
        self,
        values: dict[str, float],
        norms: dict[str, list[Tensor]],
        groups: int,
        seconds: float,
    ) -> dict[str, Any]:
        """What is derived from a step's means: norms, effective groups a minibatch, speed, and where the time went
        since the last figures, with what was saved and evaluated between the steps.
        """
        found: dict[str, Any] = {f"grad_norm_{phase}": torch.stack(each).mean().item() for phase, each in norms.items()}
        if "pair_weight" in values:
            size = min(self.config.minibatch_size, groups)
            weight, squared = values.pop("pair_weight"), values.pop("pair_weight_squared")
            found["effective_groups"] = size * weight**2 / squared if squared else 0.0
        found |= {f"learning_rate_{phase}": rate for phase, rate in self.policy.optimizers.last_rates.items()}
        found |= {"seconds": seconds, "tokens_per_second": values["naive_tokens"] / seconds}
        since, before = self.figured
        self.figured = time.monotonic(), dict(self.seconds)
        passed = {k: v - before.get(k, 0.0) for k, v in self.seconds.items()}
        return found | {f"share_{k}": v / (self.figured[0] - since) for k, v in passed.items() if v > 0}

    def _result(self, before: dict[str, PairReport], after: dict[str, PairReport]) -> dict[str, Any]:
        result: dict[str, Any] = {"steps": self.step, "seconds_by_stage": dict(self.seconds)} | self.feed.result()
        if self.feed.steps:
            result |= self.stall.result()
        for when, reports in (("before", before), ("after", after)):
            for kind, report in reports.items():
                suffix = kind.removeprefix("greedy") if kind.startswith("greedy") else f"_{kind}"
                result[f"accuracy_{when}{suffix}"] = report.accuracy
                result[f"report_{when}{suffix}"] = report.to_dict()
        return result

    def save(self) -> Path:
        """A checkpoint of this step in a folder of its own."""
        state = {
            "step": self.step,
            "identity": self._identity(),
            "before": {k: report.to_dict() for k, report in self.before.items()},
            "seconds": dict(self.seconds),
            "trained": [self.trained, self.last],
            "stall": self.stall.state(),
            "feed": self.feed.state(),
        }
        with self.timed("save"):
            return save_checkpoint(
                self.folder, self.step, self.policy.state(), state, self.config.save_total_limit, ranks=self.ranks
            )

    def _identity(self) -> dict[str, Any]:
        """What makes a run this run: its options (but for where and how often it writes), its rows and its dialog."""
        options = {name: value for name, value in self.config.to_dict().items() if name not in APART}
        content = {"rows": self.rows_identity, "dialog": self.method.dialog.to_dict(), "steps": self.feed.steps}
        return options | self.policy.identity() | content

    def resume(self) -> None:
        """Go on from what --resume_from_checkpoint names, if anything: weights, optimizer, step, first figures."""
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return
        path = self.ranks.from_first(lambda: self._found(wanted))
        if path is None:
            return
        state = load_checkpoint(path, self.policy.state(), ranks=self.ranks)
        self.policy.runtime.changed()
        self._compare(path, state["identity"])
        self.ranks.from_first(lambda: self._set_aside(path, state["step"], wanted))
        self.feed.restore(state["feed"])
        self.step = state["step"]
        self.seconds.update(state["seconds"])
        self.trained, self.last = state.get("trained", (0.0, 0.0))  # checkpoints of before --max_minutes have none
        self.stall = StallWatch(**state.get("stall", {}))  # checkpoints of before it have none
        self.before = {k: PairReport.from_dict(report) for k, report in state["before"].items()}
        logger.info("resumed %s at step %d of %d", path, self.step, self.feed.steps)

    def _found(self, wanted: str) -> Path | None:
        """The checkpoint to go on from; None where the run is to begin."""
        path = latest_checkpoint(self.folder) if wanted in NEWEST else Path(wanted)
        if path is None or path.resolve().parent != self.folder.resolve():
            self._refuse_finished()
        if path is None:
            if checkpoints(self.folder):
                raise CheckpointError(
                    f"{self.folder} holds checkpoints, and none is whole (see above). Move them away to begin anew."
                )
            if wanted != "auto":
                logger.warning("%s holds no checkpoint to resume from: the run starts at its beginning.", self.folder)
        return path

    def _set_aside(self, path: Path, step: int, wanted: str) -> None:
        """Checkpoints past `path`, which were found damaged."""
        for later in checkpoints(self.folder, past=step):
            if wanted not in NEWEST:
                raise CheckpointError(
                    f"{self.folder} holds {later.name}, which lies past {path} and would have to be overwritten. Give "
                    "another --output_dir, or move the later checkpoints away."
                )
            logger.warning("%s is damaged, and was set aside as %s.", later, set_aside(later).name)

    def _refuse_finished(self) -> None:
        """CheckpointError where the folder holds a model, which this run would write over."""
        held = [name for name in ("model", "adapter") if (self.folder / name).exists()]
        if held:
            raise CheckpointError(
                f"{self.folder} holds {' and '.join(held)} of a run that came to its end, and no checkpoint of it to "
                "go on from. A finished run is never written over: give another --output_dir."
            )

    def _compare(self, path: Path, theirs: dict[str, Any]) -> None:
        mine = self._identity()
        differing = {k: f"{k} was {theirs.get(k)!r}, is {v!r}" for k, v in mine.items() if theirs.get(k) != v}
        tuned = [text for name, text in differing.items() if name in TUNABLE]
        if tuned:
            logger.warning("The run goes on, but no longer as it began: %s.", "; ".join(tuned))
        if len(differing) > len(tuned):
            strange = "; ".join(text for name, text in differing.items() if name not in TUNABLE)
            raise CheckpointError(
                f"{path} belongs to another run: {strange}. Resume with the options of {path.parent / 'config.yaml'}, "
                "or start anew in another --output_dir."
            )


def counters(batches: Sequence[Batch]) -> dict[str, int]:
    """What one pass over `batches` computes: positions in the backbone, those of them that are padding, rows of the
    head; and the tokens of all sequences, which a pass without sharing or padding would take.
    """
    names = ("trunk_tokens", "naive_tokens", "head_rows", "padding")
    return {name: sum(getattr(batch, name) for batch in batches) for name in names}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(finite(content), indent=2) + "\n", encoding="utf-8")
    part.replace(path)
