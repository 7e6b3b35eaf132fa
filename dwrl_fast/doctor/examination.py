"""All checks of one setup, in the order of their dependencies."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from dwrl_fast import embedded
from dwrl_fast.compute import Compute, step_seed
from dwrl_fast.data import Preference
from dwrl_fast.data.mixture import Part
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.doctor import layouts, machine, ranks, thoughts, tokens, weights
from dwrl_fast.doctor.finding import Finding, Report
from dwrl_fast.doctor.options import DoctorConfig
from dwrl_fast.doctor.setup import Setup, compute
from dwrl_fast.encode import Group, Request
from dwrl_fast.errors import LabelError, NotFiniteError, TemplateError, UserError
from dwrl_fast.feed import read_rows
from dwrl_fast.methods import METHODS
from dwrl_fast.models.model import check_positions, check_vocabulary
from dwrl_fast.progress import Display, Stage
from dwrl_fast.ranks import Ranks
from dwrl_fast.sampling import sample_groups
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.templates import load_template
from dwrl_fast.training.policy import load_judging
from dwrl_fast.training.rollout import Rollout

Result = TypeVar("Result")
REST = "all other checks"
AS_SAID = "Do what the message says; docs/doctor.md has more."


def examine(config: DoctorConfig, report: Report, display: Display, together: Ranks) -> None:
    """Run all checks and add their findings to `report`. together: the ranks, which all call this."""
    where = Compute.resolve(config.dtype)
    report.add(machine.device(where, together), machine.kernels(where))
    if together.mesh is not None:
        report.add(ranks.collectives(together, where.device))
    else:
        report.leave_out(
            "there is one process: start it with torchrun",
            "collectives",
            "uneven ranks",
            "sharded gradients",
            "replicas",
        )
    dialog = _dialog(config, together, report)
    found = dialog and _attempt("rows", together, report, lambda: _rows(config, dialog, display))
    if not (dialog and found):
        return report.leave_out("they need what failed above", REST)
    rows, longest = found
    report.add(tokens.texts(dialog, len(rows)))
    setup = _setup(config, dialog, where, together, longest, report)
    if setup is None:
        return report.leave_out("they need what failed above", REST)
    _look_at_model(setup, longest, report)
    if "weights" in report.named("fail"):
        return report.leave_out("they need what failed above", REST)
    _look_at_rows(setup, rows, report, display)


def _attempt(name: str, together: Ranks, report: Report, attempt: Callable[[], Result]) -> Result | None:
    """The result of `attempt`; None on all ranks if it raises a UserError on one, which becomes a finding. `attempt`
    must not wait for other ranks.
    """
    try:
        return together.agreed(attempt)
    except UserError as error:
        report.add(Finding(name, "fail", str(error), AS_SAID))
        return None


def _dialog(config: DoctorConfig, together: Ranks, report: Report) -> Dialog | SingleTurn | None:
    template = config.template
    if template is not None and _attempt("template", together, report, lambda: load_template(template)) is None:
        return None
    try:
        dialog = together.agreed(lambda: load_dialog(config))
    except LabelError as error:
        report.add(Finding("labels", "fail", str(error), tokens.OTHER_LABELS))
    except TemplateError as error:
        report.add(Finding("chat template", "fail", str(error), tokens.OTHER_TEMPLATE))
    except UserError as error:
        report.add(Finding("tokenizer", "fail", str(error), AS_SAID))
    else:
        scalar = METHODS[config.method].scalar
        report.add(tokens.chat_template(dialog), tokens.bos(dialog), tokens.padding(dialog, scalar=scalar))
        report.add(*tokens.labels(dialog))
        return dialog
    return None


def _rows(config: DoctorConfig, dialog: Dialog | SingleTurn, display: Display) -> tuple[list[Preference], int]:
    """The first usable rows of all files, and the tokens of the longest sequence (of a stream, as a run expects)."""
    method = METHODS[config.method]
    parts: Sequence[Part] = config.eval_dataset_name
    if method.trains:
        parts = config.dataset_mixture or (Part(str(config.dataset_name)),)
    each = -(-config.limit // len(parts))
    rows, longest = read_rows(parts, config, dialog, display, limit=each, imitated=method.imitates)
    if config.streaming and method.trains:
        longest = max(longest, config.max_length)
    return rows[: config.limit], longest


def _setup(
    config: DoctorConfig, dialog: Dialog | SingleTurn, where: Compute, together: Ranks, longest: int, report: Report
) -> Setup | None:
    """The model, loaded and tried on a few tokens as in training. With several ranks an error is raised: the others
    wait for this rank while they load, so it must end.
    """

    def load() -> Setup:
        method = METHODS[config.method](config, dialog)
        judging = load_judging(config, method, dialog, where, together)
        model = judging.runtime.model
        check_vocabulary(model, max(len(dialog.tokenizer) - 1, dialog.pad_id))
        check_positions(model, longest + config.max_completion_length * bool(method.thinks or method.thoughts_each))
        return Setup(config, method, judging, Rollout(method, judging).sampler)

    if together.count > 1:
        return load()
    try:
        return load()
    except NotFiniteError as error:
        report.add(Finding("weights", "fail", str(error), weights.OTHER_WEIGHTS))
    except UserError as error:
        report.add(Finding("model", "fail", str(error), AS_SAID))
    return None


def _look_at_model(setup: Setup, longest: int, report: Report) -> None:
    runtime = setup.runtime
    report.add(weights.finite(runtime), machine.memory(runtime, setup.method, setup.config, longest))
    if not setup.method.scalar:
        report.add(weights.generation_config(runtime.model.lm))


def _look_at_rows(setup: Setup, rows: Sequence[Preference], report: Report, display: Display) -> None:
    method, runtime = setup.method, setup.runtime
    seed = step_seed(setup.config.seed, "doctor", 0)
    requests: list[Request] = []
    if method.thinks or method.thoughts_each:
        requests = method.requests(rows, seed)
        groups = sampled(setup, requests, seed, display)
    else:
        groups = method.groups(rows, seed)
    if not groups:
        report.add(
            Finding(
                "rows",
                "fail",
                "the method uses none of the rows that were read: the responses of each row tie",
                "Raise --limit.",
            )
        )
        return
    computed = compute(setup, groups)
    if method.thinks:
        report.add(thoughts.thoughts(setup, groups))
    else:
        report.leave_out(f"{method.name} judges without thoughts", "thoughts", "sampler and trainer", "fresh weights")
    if setup.reads_labels:
        report.add(thoughts.label_mass(setup, groups))
        if method.thinks and method.thoughts_each > 1:
            report.add(thoughts.spread(groups, computed))
    elif method.thinks:
        report.add(thoughts.verdicts(setup, requests, groups))
    contexts = [context.ids for request in requests for context in request.contexts]
    if setup.samples_itself:
        report.add(*thoughts.sampler_and_trainer(setup, groups, computed))
    report.add(*layouts.one_and_many(setup, contexts, groups, computed, seed))
    layout = layouts.tree_and_padded(setup, groups)
    if layout is None:
        report.leave_out("this model runs only with --packing padded", "layouts")
    else:
        report.add(layout)
    if setup.samples_itself and method.trains:
        report.add(weights.current(setup, requests, seed))
    elif method.thinks:
        report.leave_out("the examined model is not trained, or does not write the thoughts", "fresh weights")
    if runtime.sharded is not None:
        report.add(ranks.uneven(setup, groups, computed), ranks.gradients(runtime))
        report.add(*ranks.synced(runtime), ranks.peak(runtime.ranks, runtime.compute.device))


def sampled(setup: Setup, requests: Sequence[Request], seed: int, display: Display) -> list[Group]:
    """Groups with thoughts for all `requests`, as many and as long as in training, and with scores if the sampler gives
    them.
    """
    assert setup.sampler is not None
    count = sum(len(request.contexts) for request in requests)
    with display.stage("sample thoughts", count) as stage:
        return sample_groups(
            requests,
            setup.method.question,
            setup.sampler,
            setup.method.thoughts_each or 1,
            max_tokens=setup.config.max_completion_length,
            temperature=setup.method.sampling_temperature,
            seed=seed,
            progress=stage.advance,
            normalization=setup.config.score_normalization if thoughts.rates(setup) else None,
        )


@contextmanager
def embedded_task(config: DoctorConfig, display: Display, together: Ranks) -> Iterator[tuple[embedded.Embedded, str]]:
    """The embedded task of the last run in runs/, or a temporary one; and a text that says which."""
    with ExitStack() as stack:
        made, which = together.from_first(lambda: _found_or_made(config, display, stack))
        yield made, which
        # From here on no rank reads it. After an error the ranks would wait here for the one that fails.
        together.gather(None)


def _found_or_made(config: DoctorConfig, display: Display, stack: ExitStack) -> tuple[embedded.Embedded, str]:
    left = [path for path in Path("runs").glob(f"*/embedded/{embedded.RECORD}") if path.with_name("model").is_dir()]
    if left:
        folder = max(left, key=lambda path: path.stat().st_mtime).parent
        return embedded.Embedded.read(folder), f"that of {folder}"
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dwrl-fast-doctor-")))
    stages: dict[str, Stage] = {}

    def progress(name: str, done: int, total: int, info: dict[str, float]) -> None:
        if name not in stages:
            stages[name] = bars.enter_context(display.stage(f"warm up, {name}", total))
        stages[name].advance(done - stages[name].done, **info)

    with ExitStack() as bars:
        made = embedded.prepare(folder, config.seed, easy_fraction=config.easy_fraction, progress=progress)
    return made, f"warmed up in {made.seconds:.0f} s, because no run in runs/ left one"
