"""Measures which questions a pretrained model can answer: every packaged template, and other wordings of the dialog.

    python -m bench.learning.templates --data data/words/test.jsonl --json FILE

For each template the untrained model judges the first --rows pairs, with two sampled thoughts of at most --tokens
tokens per response or comparison. Label mass is the probability of the labels where they are read; truncated is the
share of thoughts that were cut; spread is the mean standard deviation, in nats, of the scores of a response's thoughts,
which is the training signal of thoughts; unread is the share of unreadable verdicts in text. Accuracy is that of the
mean p(Yes) of both thoughts, with its interval; it is not computed for templates that compare. WORDINGS holds the
further wordings.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from bench import command
from bench.machine import machine
from dwrl_fast.batching.batch import Batch
from dwrl_fast.compute import Compute, step_seed
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.data.mixture import Part
from dwrl_fast.doctor import thoughts
from dwrl_fast.doctor.examination import sampled
from dwrl_fast.doctor.setup import Computed, Setup
from dwrl_fast.encode import Group
from dwrl_fast.evaluation.pairs import pair_report
from dwrl_fast.methods import METHODS
from dwrl_fast.progress import Display
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.templates import Template, load_template, template_names
from dwrl_fast.training.policy import load_judging
from dwrl_fast.training.rollout import Rollout

METHOD = {"dialog": "dwrl", "direct": "gram", "pairwise": "judge", "pointwise": "grpo-point"}  # by kind of template
REVIEW, BRIEF = load_template("dialog").evaluate, load_template("brief").evaluate
LONG_RATE = "On the strength of your review, is that response good with regard to {aspect}? Reply with Yes or No only."
WORDINGS = {
    "dialog, long rate": Template(REVIEW, LONG_RATE),
    "brief, long rate": Template(BRIEF, LONG_RATE),
    "brief, answers": Template(BRIEF, "Does that response answer what was asked? Answer Yes or No."),
    "brief, good or bad": Template(BRIEF, "Is that response good or bad? Answer Good or Bad.", ("Good", "Bad")),
    "brief, true or false": Template(BRIEF, "True or False: that response is a good one.", ("True", "False")),
}
FIGURES = ("mass", "truncated", "tokens", "spread", "unread")


def examined(name: str, template: str, kind: str, args: argparse.Namespace, rows: list[Preference]) -> dict[str, Any]:
    """The figures of one template, given by the name of a packaged one or as a file."""
    method_name = METHOD[kind]
    options: dict[str, Any] = {"max_completion_length": args.tokens} if METHODS[method_name].thinks else {}
    options |= {"num_generations": 2} if options and METHODS[method_name].trains else {}
    files: dict[str, Any] = {"dataset_name": str(args.data)} if METHODS[method_name].trains else {}
    config = TrainConfig(
        model_name_or_path=str(args.model),
        eval_dataset_name=(Part(str(args.data)),),
        method=method_name,  # type: ignore[arg-type]
        template=template,
        seed=args.seed,
        **options | files,
    )
    dialog, place = load_dialog(config), Compute.resolve(config.dtype)
    method = METHODS[method_name](config, dialog)
    judging = load_judging(config, method, dialog, place)
    setup = Setup(config, method, judging, Rollout(method, judging).sampler)
    seed = step_seed(config.seed, "templates", 0)
    with Display(Console(stderr=True)) as display:
        requests = method.requests(rows, seed) if method.thinks else []
        groups = sampled(setup, requests, seed, display) if method.thinks else method.groups(rows, seed)
    found: dict[str, float] = thoughts.thoughts(setup, groups).figures if method.thinks else {}
    report = None
    if setup.reads_labels:
        read = setup.runtime.run_batches(groups, partial(labels_of, setup))
        computed, masses = [one for one, _ in read], torch.cat([mass for _, mass in read])
        found = found | {"mass": masses.mean().item()}
        if method.thinks:
            found = found | thoughts.spread(groups, computed).figures
            report = pair_report(scores(groups, computed), [group.ranks for group in groups], args.seed)
    else:
        found = found | thoughts.verdicts(setup, requests, groups).figures
    figures = {k: found[k] for k in FIGURES if k in found}
    return {"template": name, "kind": kind, "figures": figures, "report": report and report.to_dict()}


def labels_of(setup: Setup, batch: Batch) -> list[tuple[Computed, torch.Tensor]]:
    """For each group, the scores of its sequences and the label mass, in one pass."""
    head = setup.runtime.model(batch, tokens=False)
    both = head.scores_and_mass(setup.method.dialog.label_ids, "vocab")
    scores, mass = ([joined(some) for some in batch.by_sequence(each.tolist())] for each in both)
    return [(Computed(one, torch.empty(0)), other) for one, other in zip(scores, mass, strict=True)]


def joined(nested: Iterable[Iterable[float]]) -> torch.Tensor:
    """All values in one tensor."""
    return torch.tensor(list(chain.from_iterable(nested)))


def scores(groups: list[Group], computed: list[Computed]) -> torch.Tensor:
    """[groups, 2]: the log of the mean p(Yes) over the thoughts of each response, in nats."""
    rows = []
    for group, one in zip(groups, computed, strict=True):
        each = one.scores.double().split([len(some) for some in group.sequences])
        rows.append(torch.stack([some.logsumexp(0) - torch.tensor(float(len(some))).log() for some in each]))
    return torch.stack(rows)


def main() -> None:
    """The command: the packaged templates that apply to a model, then WORDINGS."""
    parser = command.parser("learning.templates", __doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"), help="default models/smollm2")
    parser.add_argument("--data", type=Path, required=True, help="a file of pairs")
    parser.add_argument("--rows", type=int, default=200, help="pairs (default 200)")
    parser.add_argument("--tokens", type=int, default=48, help="of a thought at most (default 48)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of templates or wordings (default: all)")
    parser.add_argument("--json", type=Path, help="where figures are kept; templates that it holds are not asked again")
    args = parser.parse_args()
    rows = read_preferences(args.data, limit=args.rows).rows
    setting = {"model": args.model.name, "data": f"{args.data.parent.name}/{args.data.name}"}  # wherever they lie
    setting |= {"rows": len(rows), "tokens": args.tokens, "seed": args.seed}
    report: dict[str, Any] = {"benchmark": "templates", "setting": setting, "machine": machine(), "templates": []}
    if args.json and args.json.exists():
        report = json.loads(args.json.read_text())
        if report["setting"] != setting:
            parser.error(f"{args.json} holds figures of {report['setting']}, and this is {setting}: name another file")
    found = report["templates"]
    with tempfile.TemporaryDirectory() as folder:
        kinds = {name: load_template(name).kind for name in template_names()}
        asked = {name: (name, kind) for name, kind in kinds.items() if kind in METHOD}
        for i, (name, wording) in enumerate(WORDINGS.items()):
            path = Path(folder) / f"{i}.yaml"
            path.write_text(yaml.safe_dump(wording.to_dict()), encoding="utf-8")
            asked[name] = (str(path), "dialog")
        for name, (template, kind) in asked.items():
            wanted = args.only is None or name in args.only
            if wanted and all(one["template"] != name for one in found):
                found.append(examined(name, template, kind, args, rows))
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=150).print(table(f"{len(rows)} pairs of {args.data}, thoughts of {args.tokens} tokens", found))


def table(title: str, found: list[dict[str, Any]]) -> Table:
    """A table with one line per template."""
    lines = []
    for one in found:
        cells = [f"{one['figures'][k]:.3g}" if k in one["figures"] else "" for k in FIGURES]
        report = one["report"]
        accuracy = f"{report['accuracy']:.3f} [{report['low']:.3f}, {report['high']:.3f}]" if report else ""
        lines.append((one["template"], *cells, accuracy))
    headings = ("template", "label mass", "truncated", "tokens", "spread", "unread", "accuracy")
    return command.table(title, headings, lines)


if __name__ == "__main__":
    main()
