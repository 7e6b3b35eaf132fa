"""The training loop: rollout batch by rollout batch, the same for every method.

A step is one rollout batch: thoughts are sampled with the weights as they stand, then the batch's minibatches are
trained, each phase in turn. All that is random depends on (seed, step) alone, so a run that resumes at a step boundary
goes on to the bit.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwrl_fast.batch import Group, pad_batch, split_by_budget
from dwrl_fast.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dwrl_fast.compute import step_seed
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference
from dwrl_fast.errors import CheckpointError, UserError
from dwrl_fast.evaluation.pairs import PairReport, pair_report
from dwrl_fast.log import logger
from dwrl_fast.methods import Method, Tally
from dwrl_fast.optimizer import Optimizers
from dwrl_fast.order import Order
from dwrl_fast.progress import Display, Stage
from dwrl_fast.runlog import RunLog, StallWatch, finite
from dwrl_fast.scorer import marginal_scores


class NotFiniteError(UserError):
    """A loss or gradient was not a number; the step was not taken."""


class Trainer:
    """Trains `method` on `rows`, evaluates it on `held_out`, and writes into `folder`."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        rows: Sequence[Preference],
        held_out: Sequence[Preference],
        folder: Path,
        display: Display,
    ):
        self.config, self.method, self.rows, self.held_out = config, method, rows, held_out
        self.folder, self.display = folder, display
        self.order = Order(len(rows), config.rollout_batch_size, config.num_train_epochs, config.max_steps, config.seed)
        self.optimizers = Optimizers(
            method, config, total=self.order.steps * -(-config.rollout_batch_size // config.minibatch_size)
        )
        self.step = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.stall = StallWatch()

    def train(self) -> dict[str, Any]:
        """Every step from where the run stands. Returns what `result.json` holds of it."""
        self.method.model.train()
        before = self._resume()
        log = RunLog(self.folder, self.step)
        reports = {"before": before or self.evaluate("before")}
        with self.display.stage(f"train {self.method.name}", self.order.steps) as stage:
            stage.advance(self.step)
            while self.step < self.order.steps:
                values = self.train_step(log, stage)
                last = self.step == self.order.steps
                if self.config.eval_steps and self.step % self.config.eval_steps == 0 and not last:
                    reports["now"] = self.evaluate(f"step {self.step}")
                    values |= {f"eval_{k}": report.accuracy for k, report in reports["now"].items()}
                log.metrics(self.step, finite(values))
                if last or (self.config.save_steps and self.step % self.config.save_steps == 0):
                    self.save(reports["before"])
        reports["after"] = self.evaluate("after")
        with self.timed("save"):
            self.method.save_model(self.folder / "model")
        return self._result(reports["before"], reports["after"])

    def train_step(self, log: RunLog, stage: Stage) -> dict[str, Any]:
        """One rollout batch: sample, update, and the figures of both."""
        started, spent = time.monotonic(), dict(self.seconds)
        rows = [self.rows[i] for i in self.order[self.step]]
        # Dropout, where a model has it, is the one use of the global stream.
        torch.manual_seed(step_seed(self.config.seed, "dropout", self.step))
        with (
            self.timed("rollout"),
            self.display.stage("  sample thoughts", sum(len(row.responses) for row in rows)) as sampling,
        ):
            groups, values = self.method.rollout(
                rows, step_seed(self.config.seed, "rollout", self.step), sampling.advance
            )
        tally, norms = Tally(), defaultdict(list)
        size = self.config.minibatch_size
        minibatches = [groups[i : i + size] for i in range(0, len(groups), size)]
        with self.display.stage("  update", len(minibatches) * len(self.method.phases)) as updating:
            for phase, m in self._schedule(len(minibatches)):
                norms[phase].append(self.update(phase, minibatches[m], m, tally))
                updating.advance()
        values |= tally.means()
        if groups[0].ended:
            log.thoughts(self.step + 1, groups, self.method.dialog.tokenizer)
        self.step += 1
        values |= self._figures(values, norms, groups, time.monotonic() - started, spent)
        self.stall.update(values, size)
        stage.advance(1, **{k: values[k] for k in ("loss", "train_accuracy", "thought_length") if k in values})
        return values

    def _schedule(self, minibatches: int) -> Iterator[tuple[str, int]]:
        phases = self.method.phases
        if self.config.alternate == "rollout":
            yield from ((phase, m) for phase in phases for m in range(minibatches))
        else:
            yield from ((phase, m) for m in range(minibatches) for phase in phases)

    def update(self, phase: str, minibatch: Sequence[Group], index: int, tally: Tally) -> Tensor:
        """One optimizer step of `phase` over a minibatch, micro-batch by micro-batch; the gradient's norm before
        clipping.
        """
        losses = []
        with self.timed(phase):
            for micro in split_by_budget(minibatch, self.config.token_budget):
                batch = pad_batch(
                    micro,
                    self.method.dialog.pad_id,
                    self.method.compute.device,
                    mask_truncated=self.config.truncated_thoughts == "mask",
                )
                with self.method.compute.autocast():
                    loss = self.method.loss(phase, batch, len(minibatch), tally)
                loss.backward()
                losses.append(loss.detach())
            norm = self.optimizers.clip()
            if not torch.isfinite(torch.stack([*losses, norm])).all():
                raise NotFiniteError(
                    f"step {self.step + 1}, minibatch {index + 1}, phase {phase}: losses "
                    f"{torch.stack(losses).tolist()}, gradient norm {norm.item()}. No step was taken with it, and the "
                    "last checkpoint is whole: resume from it with a lower learning rate, or with --dtype fp32. Rows: "
                    f"{', '.join(group.preference.source for group in minibatch[:8])} ..."
                )
            per_step = -(-self.config.rollout_batch_size // self.config.minibatch_size)
            self.optimizers.step(phase, self.step * per_step + index)
        return norm

    def evaluate(self, name: str) -> dict[str, PairReport]:
        """Reports of the held-out pairs with one greedy thought, and with --eval_votes sampled ones."""
        if not self.held_out:
            return {}
        votes = [1] + [self.config.eval_votes] * (self.config.eval_votes > 1 and self.method.scorer.thinks)
        total = len(votes) * sum(len(row.responses) for row in self.held_out)
        with self.timed("evaluate"), self.display.stage(f"evaluate {name}", total) as stage:
            found = {
                f"{k}_thoughts" if k > 1 else "greedy": pair_report(
                    marginal_scores(
                        self.method.scorer.score_groups(
                            self.held_out, votes=k, seed=self.config.seed, progress=stage.advance
                        )
                    ),
                    self.config.seed,
                )
                for k in votes
            }
        for kind, report in found.items():
            logger.info("%s, %s: accuracy %s", name, kind.replace("_", " "), report)
        return found

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[stage] += time.monotonic() - started

    def _figures(
        self,
        values: dict[str, float],
        norms: dict[str, list[Tensor]],
        groups: Sequence[Group],
        seconds: float,
        before: dict[str, float],
    ) -> dict[str, Any]:
        """What is derived from a step's means: norms, effective groups a minibatch, speed, and where the time went."""
        found: dict[str, Any] = {f"grad_norm_{phase}": torch.stack(each).mean().item() for phase, each in norms.items()}
        if "misalignment_squared" in values:
            size = min(self.config.minibatch_size, len(groups))
            squared = values.pop("misalignment_squared")
            found["effective_groups"] = size * values["misalignment"] ** 2 / squared if squared else 0.0
        tokens = sum(len(sequence.ids) for group in groups for sequence in group.flat)
        found |= {f"learning_rate_{phase}": rate for phase, rate in self.optimizers.last_rates.items()}
        found |= {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
        found |= {
            f"share_{k}": (v - before.get(k, 0.0)) / seconds for k, v in self.seconds.items() if v > before.get(k, 0.0)
        }
        return found

    def _result(self, before: dict[str, PairReport], after: dict[str, PairReport]) -> dict[str, Any]:
        result: dict[str, Any] = {"steps": self.step, "seconds_by_stage": dict(self.seconds), "rows": len(self.rows)}
        for when, reports in (("before", before), ("after", after)):
            for kind, report in reports.items():
                suffix = "" if kind == "greedy" else f"_{kind}"
                result[f"accuracy_{when}{suffix}"] = report.accuracy
                result[f"report_{when}{suffix}"] = report.to_dict()
        return result

    def _tensors(self) -> dict[str, Tensor]:
        model = {f"model.{name}": p for name, p in self.method.model.state_dict(keep_vars=True).items()}
        return {name: p.detach() for name, p in model.items()} | self.optimizers.tensors()

    def save(self, before: dict[str, PairReport]) -> Path:
        """A checkpoint of this step in a folder of its own."""
        state = {
            "step": self.step,
            "identity": self._identity(),
            "before": {k: report.to_dict() for k, report in before.items()},
            "seconds": dict(self.seconds),
        }
        with self.timed("save"):
            return save_checkpoint(self.folder, self.step, self._tensors(), state, self.config.save_total_limit)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        names = (
            "method",
            "seed",
            "rollout_batch_size",
            "minibatch_size",
            "alternate",
            "optimizer_state",
            "num_generations",
        )
        return {name: getattr(self.config, name) for name in names} | {
            "rows": len(self.rows),
            "steps": self.order.steps,
        }

    def _resume(self) -> dict[str, PairReport] | None:
        """Load what --resume_from_checkpoint names; the reports from before training, not to be measured again."""
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return None
        path = latest_checkpoint(self.folder) if wanted == "latest" else Path(wanted)
        if path is None:
            logger.warning("%s holds no checkpoint to resume from: the run starts at its beginning.", self.folder)
            return None
        tensors = self._tensors()
        state = load_checkpoint(path, tensors)
        mine = self._identity()
        differing = [
            f"{k} was {state['identity'].get(k)!r}, is {v!r}" for k, v in mine.items() if state["identity"].get(k) != v
        ]
        if differing:
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(differing)}. Resume with the options of "
                f"{self.folder / 'config.yaml'}, or start anew in another --output_dir."
            )
        later = sorted(p.name for p in self.folder.glob("checkpoint-*") if p.name > f"checkpoint-{state['step']:06d}")
        if later:
            raise CheckpointError(
                f"{self.folder} holds {later[0]}, which lies past {path} and would have to be overwritten. Give "
                "another --output_dir, or move the later checkpoints away."
            )
        self.step = state["step"]
        self.seconds.update(state["seconds"])
        logger.info("resumed %s at step %d of %d", path, self.step, self.order.steps)
        return {k: PairReport(**report) for k, report in state["before"].items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(finite(content), indent=2) + "\n", encoding="utf-8")
