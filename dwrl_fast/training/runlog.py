"""The log files of a run: metrics.jsonl with one line per rollout batch, and the thoughts with their scores."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from dwrl_fast.data.jsonl import finite
from dwrl_fast.log import logger
from dwrl_fast.scoring import ScoredGroup

METRICS = "metrics.jsonl"  # in the run's folder
NEAR_ZERO = 1e-3  # limit of a mean advantage, and of the labels' probability
SOLVED = 0.05  # nats; with a lower loss there is nothing left to learn


class Decoder(Protocol):
    """Decodes token ids."""

    def decode(self, ids: list[int]) -> str:
        """The text."""
        ...


class RunLog:
    """The log files in the folder of one run. resumed_at: the step from which the run resumes; later entries are
    dropped.
    """

    def __init__(self, folder: Path, resumed_at: int = 0):
        self.metrics_path, self.thoughts_folder = folder / METRICS, folder / "thoughts"
        self.waiting = ""  # lines that could not be written yet
        folder.mkdir(parents=True, exist_ok=True)
        rows = (
            [row for row in read_metrics(self.metrics_path) if row["step"] <= resumed_at]
            if self.metrics_path.exists()
            else []
        )
        partial = self.metrics_path.with_suffix(".part")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, self.metrics_path)
        for path in self.thoughts_folder.glob("step-*.jsonl"):
            step = path.stem.removeprefix("step-")
            if step.isdigit() and int(step) > resumed_at:
                path.unlink()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl. If that fails, an error is logged, and the line is written together with the
        next one.
        """
        self.waiting += json.dumps({"step": step, **values}) + "\n"
        size = 0
        try:
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            with self.metrics_path.open("ab") as file:
                size = file.tell()
                file.write(self.waiting.encode())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.metrics_path, size)  # remove an incomplete line
            logger.error(
                "%s: %s. The line will be written together with the next one.", self.metrics_path, error.strerror
            )
        else:
            self.waiting = ""

    def thoughts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the thoughts of a rollout batch, as `thought_rows` gives them. If that fails, an error is logged and
        they are lost.
        """
        path = self.thoughts_folder / f"step-{step:06d}.jsonl"
        try:
            self.thoughts_folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            logger.error("%s: %s. The run continues without it.", path, error.strerror)


def write_bad_batch(folder: Path, name: str, record: Mapping[str, Any]) -> str:
    """Write a batch that could not be trained to `folder`/bad_batches/`name`.json. Returns a sentence with its path."""
    path = folder / "bad_batches" / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(finite(record), ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        return f" It could not be written to {path}: {error.strerror}."
    return f" It is in {path}."


def thought_rows(scored: Sequence[ScoredGroup], decoder: Decoder) -> Iterator[dict[str, Any]]:
    """One row per sequence, as JSON: the source of its row, the index of its response (0 is the best; for methods that
    compare: of its comparison), the thought if there is one, and its score in nats or its reward. If scores do not
    belong to single sequences, as for verdicts on two responses, rows with the responses' scores follow.
    """
    for found in scored:
        group = found.group
        source = {"source": group.preference.source}
        values = {"score": found.scores, "reward": group.rewards}
        shape = list(map(len, group.sequences))
        own = {name: each for name, each in values.items() if list(map(len, each)) == shape}
        about = "response" if len(shape) == len(group.preference.responses) else "comparison"
        for k, sequences in enumerate(group.sequences):
            for i, sequence in enumerate(sequences):
                row = source | {about: k} | {name: each[k][i] for name, each in own.items()}
                if group.thoughts:
                    thought = decoder.decode(sequence.ids[sequence.thought])
                    row |= {"thought": thought, "ended": group.thoughts[k][i].ended}
                yield finite(row)
        if found.scores and "score" not in own:
            yield from (finite(source | {"response": k, "score": each[0]}) for k, each in enumerate(found.scores))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(finite(content), indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without an incomplete last line of a killed run."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line)) if line else None
        except json.JSONDecodeError:
            logger.warning("%s: an incomplete last line was dropped", path)
    return rows


class StallWatch:
    """Logs once, with the reason, that training has stalled, if a reason holds for `PATIENCE` rollout batches. Also
    records whether any rollout batch of the run trained anything.

    trained: whether any rollout batch trained anything. why: the reason of the last one that did not.
    """

    PATIENCE = 5

    def __init__(self, trained: bool = False, why: str = "") -> None:
        self.trained, self.why = trained, why
        self.streak: dict[str, int] = {}
        self.told: set[str] = set()

    def update(self, values: Mapping[str, float], minibatch_size: int) -> None:
        """Process the figures of one rollout batch."""
        kind, why = _idle(values)
        if kind:
            self.why = why
        else:
            self.trained = True
            kind, why = _narrow(values, minibatch_size)
        self.streak = {kind: self.streak.get(kind, 0) + 1}
        if kind and self.streak[kind] == self.PATIENCE and kind not in self.told:
            self.told.add(kind)
            logger.warning("training has stalled: %s.", why)

    def state(self) -> dict[str, Any]:
        """Its entry in a checkpoint."""
        return {"trained": self.trained, "why": self.why}

    def result(self) -> dict[str, Any]:
        """Its entries in `result.json`."""
        return {"trained": True} if self.trained else {"trained": False, "why": self.why}


def _idle(values: Mapping[str, float]) -> tuple[str, str]:
    """The kind of reason why a rollout batch trained nothing, and the reason with a remedy; both empty if it trained
    something.
    """
    if "kept_comparisons" in values and values["kept_comparisons"] == 0:
        return "none", (
            f"none of {values['comparisons']:.0f} comparisons has a thought to train on (right "
            f"{values.get('right_thoughts', 0):.1%}, unparsable {values.get('unparsable', 0):.1%}). Raise "
            "--num_generations; if almost none can be read, start from a model that knows the verdict's form"
        )
    if values.get("skipped_batches") and not any(name.startswith("grad_norm") for name in values):
        return "skipped", (
            "every update was skipped, because a log-prob, a loss or a gradient was not finite. The batches are in "
            "bad_batches/. Lower the learning rate"
        )
    if "loss" not in values:
        return "ties", "no row has a response that is better than another. Train on rows that are not ties"
    if values.get("label_mass", 1.0) < NEAR_ZERO:
        return "mass", (
            f"the labels together have probability {values['label_mass']:.1e} where the verdict is read: the model "
            "does not answer as asked. Give a --template with labels that it uses, or start from a model that "
            "follows instructions"
        )
    if "reward" in values and values["advantage"] < NEAR_ZERO:
        return "equal", (
            f"the thoughts of a comparison are all right or all wrong (mean reward {values['reward']:.3g}, "
            f"unparsable {values['unparsable']:.1%}), so they give no gradient. Raise --temperature or "
            "--num_generations; if almost none can be read, start from a model that knows the verdict's form"
        )
    if "effective_groups" in values and values["advantage"] < NEAR_ZERO and values["loss"] >= SOLVED:
        return "equal", (
            f"the thoughts of a response all score alike (mean |A| {values['advantage']:.1e}, p+ "
            f"{values['p_chosen']:.3g}, p- {values['p_rejected']:.3g}), so they give no gradient. Raise --temperature, "
            "lower --score_learning_rate, or try --score_normalization yes_no"
        )
    still = [name.removeprefix("grad_norm_") for name, norm in values.items() if "grad_norm_" in name and not norm]
    if still and values.get("trained_tokens") == 0:
        return "cut", (
            "all thoughts are cut at the limit, and cut thoughts are not trained. Raise --max_completion_length, or "
            "give --truncated_thoughts keep"
        )
    if still:
        return "still", (
            f"the gradient of the update {' and '.join(still)} is 0 (mean loss {values['loss']:.3g}). If the loss is "
            "near 0, the pairs are solved: add harder ones"
        )
    return "", ""


def _narrow(values: Mapping[str, float], minibatch_size: int) -> tuple[str, str]:
    """The same for a rollout batch of which only a small part trained."""
    few = values.get("effective_groups", minibatch_size) < 0.08 * minibatch_size and values["loss"] >= SOLVED
    return ("few", (
        f"of {minibatch_size} groups in a minibatch about {values['effective_groups']:.1f} contribute to the "
        "gradient; the others are solved. Raise --minibatch_size, or add harder pairs"
    )) if few else ("", "")  # fmt: skip
