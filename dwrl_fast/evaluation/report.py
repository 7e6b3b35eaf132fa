"""All figures of one evaluation, as JSON and as tables that a terminal, Markdown and a page can show alike."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dwrl_fast.data import Preference
from dwrl_fast.data.jsonl import finite
from dwrl_fast.evaluation.calibration import Calibration, calibration
from dwrl_fast.evaluation.judged import Judged, judged_report
from dwrl_fast.evaluation.pairs import PairReport, credit
from dwrl_fast.evaluation.probe import ProbeReport
from dwrl_fast.evaluation.rewardbench import Benchmark
from dwrl_fast.evaluation.table import PairTable, Slice, partitions, slice_of
from dwrl_fast.evaluation.units import Units
from dwrl_fast.evaluation.votes import VotePoint
from dwrl_fast.log import escaped
from dwrl_fast.scoring import Kind


@dataclass(frozen=True, slots=True)
class Orders:
    """Of methods that show two responses together: accuracy where the better one is shown first, where it is second,
    and the share of pairs whose two verdicts name the same response. A draw counts one half.
    """

    better_first: float
    better_second: float
    agree: float


@dataclass(frozen=True, slots=True)
class Report:
    """about: what was evaluated, in words. slices: accuracies of parts of the pairs, by what parts them. temperature:
    what --calibrate found; calibrated: the figures under it. tokens: computed, naive.
    """

    about: dict[str, Any]
    kind: Kind
    pairs: PairReport
    all: Slice
    calibration: Calibration
    slices: dict[str, list[Slice]]
    orders: Orders | None = None
    votes: list[VotePoint] = field(default_factory=list)
    benchmark: Benchmark | None = None
    temperature: float | None = None
    calibrated: Calibration | None = None
    probe: ProbeReport | None = None
    tokens: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: null stands for what is not finite."""
        return finite(dataclasses.asdict(self))


def make_report(
    judged: Sequence[Judged],
    rows: Sequence[Preference],
    units: Units,
    kind: Kind,
    about: Mapping[str, Any],
    seed: int,
) -> tuple[Report, PairTable]:
    """What can be said of any model; votes, benchmark, temperature and probe are put in by `dataclasses.replace`.

    units: of `judged` and `rows`, which are the same groups. DataError where there is nothing to measure.
    """
    pairs = judged_report(judged, seed, units)
    table = PairTable.of(judged, rows, units)
    report = Report(
        dict(about),
        kind,
        pairs,
        slice_of("all", table, np.ones(len(table.gap), dtype=bool), seed),
        calibration(table.gap, table.units.weight),
        {found.by: found.slices(table, seed) for found in partitions(table, judged, rows)},
        orders(judged, units),
    )
    return report, table


def orders(judged: Sequence[Judged], units: Units) -> Orders | None:
    """None for methods that judge responses one by one. units: of `judged`."""
    leads = [
        (place, lead, won[j, i])
        for place, row in enumerate(judged)
        for won in [dict(zip(row.comparisons, map(_better_by, row.verdicts), strict=bool(row.comparisons)))]
        for (i, j), lead in won.items()
        if row.ranks[i] < row.ranks[j]
    ]
    if not leads:
        return None
    places, first, second = np.array(leads, dtype=np.float64).T  # None becomes nan, which has no credit
    mean = units.at(places.astype(np.int64)).mean
    return Orders(mean(credit(first)), mean(credit(-second)), mean(credit(-first * second)))


def _better_by(verdicts: Sequence[float | None]) -> float | None:
    """1 where the verdicts are for the response shown first, -1 for the other, 0 a draw; None: none can be read."""
    read = [value for value in verdicts if value is not None]
    return float(np.sign(sum(read) / len(read) - 0.5)) if read else None


class Section(NamedTuple):
    """A table: the first column names, the others are figures. note: one sentence on how to read it."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


SLICED = {
    "source": ("By source", "Each file by itself."),
    "subset": ("By subset", "The values of the column `subset`."),
    "turns": ("By number of turns", "Turns of the user in the prompt."),
    "length": ("By difference of length", "Characters that the better response has more than the worse one."),
}
FEW = 20  # rows or prompts, of which a bootstrap says little
WAYS = {"mean": "mean of p(Yes)", "majority": "majority"}


def sections(report: Report) -> list[Section]:
    """The tables of a report, in the order in which they are shown."""
    found = (
        _summary(report),
        _orders(report.orders) if report.orders else None,
        _benchmark(report.benchmark) if report.benchmark else None,
        _votes(report) if report.votes else None,
        _probe(report.probe) if report.probe else None,
        *(_slices(by, parts) for by, parts in report.slices.items()),
        _reliability(report.calibration),
    )
    return [section for section in found if section is not None]


def _summary(report: Report) -> Section:
    drawn, what = report.pairs.groups, "rows"
    if report.pairs.prompts is not None:
        drawn, what = report.pairs.prompts, "prompts"
    few = f"The interval is drawn from {drawn} {what}: too few to believe it." if drawn < FEW else ""
    return Section("Summary", few, ("figure", "value"), _figures(report))


def _orders(found: Orders) -> Section:
    shares = {
        "better one shown first": found.better_first,
        "better one shown second": found.better_second,
        "both orders name the same": found.agree,
    }
    rows = [(name, f"{share:.3f}") for name, share in shares.items()]
    return Section("Order", "Accuracy in either order; without bias the two are equal.", ("", "share"), rows)


def _votes(report: Report) -> Section:
    ways = {**WAYS, "mean": "mean of the numbers"} if report.kind == "number" else WAYS
    return Section(
        "Votes",
        "Each line of fewer thoughts is drawn from those that were sampled, 64 times a pair.",
        ("thoughts", "combined by", "accuracy", "95 % interval"),
        [(f"{p.votes}", ways[p.by], f"{p.accuracy:.3f}", f"{p.low:.3f} to {p.high:.3f}") for p in report.votes],
    )


def _slices(by: str, parts: Sequence[Slice]) -> Section:
    return Section(
        *SLICED[by],
        ("", "accuracy", "95 % interval", "pairs", "longer wins"),
        [
            (p.name, f"{p.accuracy:.3f}", f"{p.low:.3f} to {p.high:.3f}", f"{p.pairs:,}", f"{p.longer_wins:.3f}")
            for p in parts
        ],
    )


def _reliability(found: Calibration) -> Section:
    return Section(
        "Reliability",
        "Confidence is sigmoid(|score difference|); where it can be believed, accuracy equals it.",
        ("confidence", "mean", "accuracy", "of all pairs"),
        [
            (f"{b.low:.2f} to {b.high:.2f}", f"{b.confidence:.3f}", f"{b.accuracy:.3f}", f"{b.share:.1%}")
            for b in found.bins
        ],
    )


def _figures(report: Report) -> list[tuple[str, str]]:
    """Names and figures; what is None does not apply to the model or was not asked for."""
    pairs, found, after = report.pairs, report.calibration, report.calibrated
    rows: list[tuple[str, Any]] = [
        ("accuracy", f"{pairs.accuracy:.3f}, 95 % interval {pairs.low:.3f} to {pairs.high:.3f}"),
        ("accuracy, clipped at one half", f"{pairs.clipped:.3f}"),
        ("longer response wins", f"{report.all.longer_wins:.3f}"),
        ("rows, pairs", f"{pairs.groups:,}, {report.all.pairs:,}"),
        ("pairs of equal scores", f"{pairs.ties:,}"),
        ("prompts, which the intervals are drawn from", None if pairs.prompts is None else f"{pairs.prompts:,}"),
        ("rows left out, all of whose responses tie", f"{pairs.tied:,}" if pairs.tied else None),
        ("verdicts that could not be read", None if report.kind == "score" else f"{pairs.unparsable:,}"),
        ("verdicts for the response shown first", None if pairs.first_share is None else f"{pairs.first_share:.3f}"),
        ("accuracy of log-probs a token", None if pairs.token_accuracy is None else f"{pairs.token_accuracy:.3f}"),
        ("negative log-likelihood, nats", f"{found.nll:.4f}"),
        ("Brier score", f"{found.brier:.4f}"),
        ("expected calibration error", f"{found.error:.4f}"),
        ("fitted temperature", None if after is None else f"{report.temperature:.4g}"),
        ("with it: nll, Brier, error", after and f"{after.nll:.4f}, {after.brier:.4f}, {after.error:.4f}"),
        ("tokens computed, naively", _tokens(report.tokens) if report.tokens else None),
        ("the probe's tokens computed, naively", report.probe and _tokens(report.probe.tokens)),
    ]
    return [(name, text) for name, text in rows if text is not None]


def _tokens(found: Mapping[str, int]) -> str:
    computed, naive = found.get("computed", 0), found.get("naive", 0)
    return f"{computed:,}, {naive:,} ({naive / max(computed, 1):.2f} x)"


def _benchmark(found: Benchmark) -> Section:
    headline = "none, parts are missing" if found.headline is None else f"{found.headline:.4f}"
    rows = [("headline", headline), *((name, f"{value:.4f}") for name, value in found.parts.items())]
    rows += [(f"· {name}", f"{value:.4f}") for name, value in found.details.items()]
    return Section(found.name, "As its authors weight it; the indented ones are what the others are made of.",
                   ("part", "score"), rows)  # fmt: skip


def _probe(found: ProbeReport) -> Section:
    rows = [("nothing", "", "", "", f"{found.accuracy:.3f}")]
    for each in found.attacks:
        known, right = math.isfinite(each.shift), math.isfinite(each.flipped)
        shift = (f"{each.shift:+.3f}", f"{each.low:+.3f} to {each.high:+.3f}") if known else ("infinite", "")
        rows.append((each.name, *shift, f"{each.flipped:.3f}" if right else "none was right", f"{each.accuracy:.3f}"))
    note = (
        f"What is appended to the worse response of {found.pairs:,} pairs, by how much its score rises against the "
        "better one's, and which share of the pairs ordered rightly before no longer are."
    )
    return Section("Probe", note, ("appended", "shift", "95 % interval", "right pairs flipped", "accuracy"), rows)


def markdown(report: Report) -> str:
    """The tables; no text of rows is in it."""
    lines = [
        f"# {_cell(report.about['model'])}",
        "",
        *(f"- {name}: {_cell(value)}" for name, value in report.about.items()),
    ]
    for section in sections(report):
        lines += ["", f"## {section.title}", ""] + ([section.note, ""] if section.note else [])
        lines += [_row(section.header), _row(["---"] + ["---:"] * (len(section.header) - 1))]
        lines += [_row(row) for row in section.rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(value: Any) -> str:
    """One line that Markdown takes as text: names of files and subsets are the user's."""
    text = escaped(" ".join(str(value).split()))
    return "".join(f"\\{c}" if c in r"\|`*_<>[]#" else c for c in text)
