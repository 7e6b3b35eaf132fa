"""`--dry_run`: reports what a run would be, from its options, rows and templates. Nothing is trained and no file is
kept. Local weights are loaded and tried on a few tokens.

All errors are collected, so that one dry run shows all of them.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from dwrl_fast.batching.layout import Layout
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Dataset, Preference, read_preferences
from dwrl_fast.data.mixture import Part
from dwrl_fast.data.published import DATA_SETS
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.encode import Group, Thought, fit
from dwrl_fast.errors import ConfigError, DataError, UserError
from dwrl_fast.feed import Feed, Shuffled
from dwrl_fast.feed.opening import reading, refuse_demonstration
from dwrl_fast.feed.shared_prompts import prompts, shared
from dwrl_fast.feed.source import with_aspect
from dwrl_fast.methods import METHODS, Method
from dwrl_fast.models.gguf import is_gguf
from dwrl_fast.models.model import check_positions, check_vocabulary, load_generative, load_scalar
from dwrl_fast.models.pretrained import try_saving
from dwrl_fast.plan.lengths import Lengths
from dwrl_fast.plan.short import short
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.training.policy import load_judging
from dwrl_fast.training.rollout import Rollout, sampled_groups

SAMPLE = 256  # rows of each file that are encoded
THOUGHT = 300  # assumed tokens of a thought; the real length is unknown before sampling
PREPARED = re.compile(r"(?P<name>[a-z0-9]+)(-(?P<train>\d+)-(?P<test>\d+))?")  # folder names of --prepare


class Findings:
    """The printed report and the collected errors."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.obstacles: list[str] = []

    def say(self, what: str, text: str) -> None:
        """Print one line of the report."""
        self.console.print(f"{what:<10} {text}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def looking_at(self, what: str) -> Iterator[None]:
        """A context that collects a UserError."""
        try:
            yield
        except UserError as error:
            self.obstacles.append(str(error))
            self.say(what, "see the error below")


@dataclasses.dataclass(frozen=True, slots=True)
class Guessed:
    """A Sampler whose thoughts have `tokens` random tokens, the last one an end-of-turn."""

    tokens: int
    vocabulary: int
    end_id: int
    float32 = True

    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        n: int,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Thought]]:
        """See `Sampler.sample`; `max_tokens` and `temperature` are ignored."""
        drawn = np.random.default_rng(seed).integers(self.vocabulary, size=(len(contexts), n, self.tokens)).tolist()
        return [
            [Thought([*ids[:-1], self.end_id], [0.0] * self.tokens, True) for ids in thoughts] for thoughts in drawn
        ]


def dry_run(config: TrainConfig, console: Console, ranks: Ranks = ALONE) -> None:
    """Report what the run would be on `ranks`. Raises UserError with all collected errors."""
    found = Findings(console)
    found.say("dry run", f"{config.method}; nothing is trained, no file is kept")
    with found.looking_at("placement"):
        if refused := config.refusal(sharded=ranks.mesh is not None, cuda=torch.cuda.is_available()):
            raise ConfigError(refused)
    if config.own_data:
        _look_at_all(config, ranks, found)
    else:
        found.say("data", "the embedded task creates its model and its pairs when it runs")
    if found.obstacles:
        raise UserError("\n\nerror: ".join(found.obstacles))
    found.say("ready", "the same command without --dry_run runs it")


def _look_at_all(config: TrainConfig, ranks: Ranks, found: Findings) -> None:
    """Report the template, the rows and the model."""
    dialog = method = None
    with found.looking_at("template"):
        dialog = load_dialog(config)
        found.say("template", _told(dialog))
        method = METHODS[config.method](config, dialog)
        if method.question is not dialog:
            found.say("", _told(method.question))
    made = METHODS[config.method]
    trained: Sequence[Part] = ()
    if made.trains:
        trained = config.dataset_mixture or (Part(str(config.dataset_name), 1.0),)
    training = [_look_at(part, config, dialog, found, made.imitates) for part in trained]
    held_out = [_look_at(part, config, dialog, found, False) for part in config.eval_dataset_name]
    if said := shared(
        prompts(row for rows, _ in training for row in rows), [row for rows, _ in held_out for row in rows]
    ):
        found.say("warning", said)
    longest = max((tokens for _, tokens in [*training, *held_out]), default=0)
    if config.streaming and made.trains:  # the longest row is unknown: a run expects this
        longest = max(longest, config.max_length)
    files = [rows for rows, _ in training]
    if trained and all(files):
        _say_updates(trained, files, config, found)
        if method is not None:
            _say_tokens([row for rows in files for row in _some(rows, SAMPLE // len(files))], config, method, found)
    with found.looking_at("model"):
        _say_model(config, method, longest, found)
        if method is not None and made.trains and _model_at_hand(config):
            _say_memory(config, longest, ranks.count, found)
        if method is not None and weights_at_hand(config.model_name_or_path):
            _say_trial(config, method, found)


def preparation(name: str) -> str:
    """The command that makes the file `name`; empty if there is none.

    The file's folder must have the name of the data set, or that name with the rows of both files, as in
    data/ultrafeedback-14407-784.
    """
    path = Path(name)
    match = PREPARED.fullmatch(path.parent.name)
    if path.name not in ("train.jsonl", "test.jsonl") or match is None or match["name"] not in DATA_SETS:
        return ""
    source = " --source COPY" if DATA_SETS[match["name"]].repository is None else ""
    rows = f" --train_rows {match['train']} --test_rows {match['test']}" if match["train"] else ""
    return f"python -m dwrl_fast.data --prepare {match['name']}{source}{rows} --output_dir {path.parent}"


def _told(dialog: Dialog | SingleTurn) -> str:
    template, ids = dialog.template, dialog.label_ids
    parts = [f"of kind {template.kind}", f"aspect: {dialog.aspect}", f"tokenizer: {dialog.tokenizer.name_or_path}"]
    if template.labels is not None and ids is not None:
        parts.append("labels: " + ", ".join(f"{label} ({i})" for label, i in zip(template.labels, ids, strict=True)))
    return "; ".join(parts)


def _look_at(
    part: Part, config: TrainConfig, dialog: Dialog | SingleTurn | None, found: Findings, imitated: bool
) -> tuple[list[Preference], int]:
    """The rows of a file, and the tokens of the longest encoded sequence, with an empty thought."""
    with found.looking_at("data"):
        dataset = _read(part, config, dialog, imitated)
        if not imitated:
            refuse_demonstration(dataset.rows[0])
        found.say("data", dataset.summary + (" (the first rows of the stream)" if config.streaming else ""))
        for line in dataset.warnings:
            found.say("warning", line)
        if dialog is None:
            return dataset.rows, 0
        return dataset.rows, _say_encoded(dataset, config, dialog, found)
    return [], 0


def _read(part: Part, config: TrainConfig, dialog: Dialog | SingleTurn | None, imitated: bool) -> Dataset:
    name = part.dataset_name
    try:
        dataset = read_preferences(
            name,
            columns=config.columns,
            limit=max(SAMPLE, config.rollout_batch_size) if config.streaming else None,
            **reading(part, config, dialog, imitated),
        )
    except DataError as error:
        command = preparation(name)
        remedy = "" if Path(name).exists() or not command else f"\n  This command makes it: {command}"
        raise DataError(f"{error}{remedy}") from error
    dataset.rows = [with_aspect(row, part.aspect) for row in dataset.rows]
    return dataset


def _some(rows: Sequence[Preference], count: int) -> list[Preference]:
    """`count` rows, evenly spaced over the file, or all rows."""
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


def _say_encoded(dataset: Dataset, config: TrainConfig, dialog: Dialog | SingleTurn, found: Findings) -> int:
    some, sizes, reasons = _some(dataset.rows, SAMPLE), [], Counter[str]()
    dialog.counts.clear()
    for row in some:
        tokens, reason = fit(row, dialog, config.max_length)
        if reason:
            reasons[reason] += 1
        else:
            sizes.append(tokens)
    left_out = "".join(f"; {count} left out: {reason}" for reason, count in reasons.most_common())
    if not sizes:
        raise DataError(f"{dataset.path}: none of the {len(some)} encoded rows can be used{left_out}")
    half, most, longest = np.percentile(sizes, (50, 95, 100)).round().astype(int).tolist()
    notes = "".join(f"; {count} {what}" for what, count in dialog.counts.most_common())
    found.say(
        "encoded",
        f"{len(some):,} of its {len(dataset.rows):,} groups: longest sequence without thought {half} tokens in the "
        f"median, {most} at the 95th percentile, {longest} at most{left_out}{notes}",
    )
    return longest


def _say_updates(
    parts: Sequence[Part], files: Sequence[list[Preference]], config: TrainConfig, found: Findings
) -> None:
    """Report the updates, for files that were read whole; rows that are too long are still included."""
    sources = [Shuffled(part.dataset_name, rows, config.seed) for part, rows in zip(parts, files, strict=True)]
    feed = Feed(
        sources,
        [part.weight or 1.0 for part in parts],
        batch_size=config.rollout_batch_size,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
    )
    found.say(
        "updates",
        f"{feed.total:,} groups in {feed.steps:,} rollout batches of up to {config.rollout_batch_size:,}; "
        f"{feed.minibatches(config.minibatch_size):,} minibatches of {config.minibatch_size}; learning rate "
        f"{config.learning_rate:g}, {config.lr_scheduler_type}",
    )


def _say_tokens(rows: Sequence[Preference], config: TrainConfig, method: Method, found: Findings) -> None:
    """Report the tokens of one rollout batch like `rows`, laid out in minibatches."""
    length, dialog = min(THOUGHT, config.max_completion_length), method.dialog
    rows = [row for row in rows if not fit(row, dialog, config.max_length)[1]]
    groups = guessed_groups(rows, method, length) if rows else []
    if not groups:
        found.say("tokens", "not counted: the method trains on none of the encoded rows")
        return
    layout = Layout(config.packing, config.token_budget, dialog.pad_id, torch.device("cpu"))
    size = config.minibatch_size
    batches = [b for i in range(0, len(groups), size) for b in layout.batches(groups[i : i + size])]
    computed, naive = (sum(getattr(b, name) for b in batches) for name in ("trunk_tokens", "naive_tokens"))
    scale = config.rollout_batch_size / len(groups)
    thoughts = f", with thoughts assumed to have {length} tokens," if method.thoughts_each else ""
    about = "at most" if method.selects else "about"  # only thoughts with a right verdict are trained
    found.say(
        "tokens",
        f"a rollout batch{thoughts} is {about} {computed * scale:,.0f} tokens through the backbone "
        f"({config.packing}); each sequence alone would be {naive * scale:,.0f}: {naive / computed:.2f} x; about "
        f"{len(batches) * scale:,.0f} forward passes of at most {config.token_budget:,}",
    )


def guessed_groups(rows: Sequence[Preference], method: Method, length: int) -> list[Group]:
    """The groups that a rollout would make from the rows, with thoughts of `length` random tokens. For methods that
    keep only some thoughts, all are included.
    """
    seed = method.config.seed
    if not method.thoughts_each:
        return method.groups(rows, seed)
    question = method.question
    guessed = Guessed(length, len(question.tokenizer), question.end_id)
    requests = method.requests(rows, seed)
    return method.reward(requests, sampled_groups(method, requests, guessed, seed))[0]


def _say_model(config: TrainConfig, method: Method | None, longest: int, found: Findings) -> None:
    """Report the model from its config.json, if that is available: on disk, or on the hub if the tokenizer just came
    from there.
    """
    name = config.model_name_or_path or str(config.model_config)
    if not (_model_at_hand(config) and (method is not None or Path(name).exists())):
        found.say("model", f"{name} is not on this machine, and the hub was not asked for it: training needs it")
        return
    made = METHODS[config.method]
    with torch.device("meta"):
        model = load_scalar(None, name, config.seed, 0) if made.scalar else load_generative(None, name, config.seed)
    parameters = sum(p.numel() for p in model.parameters())
    moments = 8 * (len(method.phases) if method is not None and method.separate_states else 1)
    least = parameters * (4 + 4 + moments) / 2**30
    trained = "" if config.use_peft or not made.trains else (
        f"; weights, gradients and AdamW's moments in float32 take {least:.3g} GiB, plus activations"
    )  # fmt: skip
    found.say("model", f"{name}: {type(model.lm).__name__}, {parameters:,} parameters{trained}")
    if method is not None:
        check_vocabulary(model, max(len(method.dialog.tokenizer) - 1, method.dialog.pad_id))
        writes = method.thinks or bool(method.thoughts_each)
        check_positions(model, longest + config.max_completion_length * writes)


def _model_at_hand(config: TrainConfig) -> bool:
    """Whether the model's config.json is on disk, or on the hub from which the tokenizer just came."""
    local = Path(config.model_name_or_path or str(config.model_config)).exists()
    return local or config.tokenizer_name_or_path in (None, config.model_name_or_path)


def _say_memory(config: TrainConfig, longest: int, ranks: int, found: Findings) -> None:
    """Report the short form of the plan, for groups as long as the longest. A run that cannot be planned may still
    work.
    """
    lengths = Lengths(max(1, longest // 2), max(1, longest // 2), min(THOUGHT, config.max_completion_length))
    try:
        found.say("memory", short(config, lengths, ranks))
    except UserError as error:
        found.say("memory", f"not planned: {error}")


def weights_at_hand(name: str | None) -> bool:
    """Whether the model's weights, or adapters, are on this machine."""
    return name is not None and (is_gguf(name) or any(Path(name).glob("*.safetensors")))


def _say_trial(config: TrainConfig, method: Method, found: Findings) -> None:
    """Load, place, sample from, merge and save the model as a run would, but in this process alone."""
    compute = Compute.resolve(config.dtype)
    judging = load_judging(dataclasses.replace(config, cpu_offload=False), method, method.dialog, compute)
    Rollout(method, judging)
    try_saving(Path(config.output_dir or "."), judging.runtime.model, method.dialog, method.card())
    does = ["its layout"] + ["sampling"] * method.thinks + ["merging"] * config.use_peft + ["saving"]
    found.say("trial", f"tried on a few tokens: {', '.join(does)}; all of it works")
