"""The report as one self-contained HTML file: inline plots, an expandable sample of rows, no scripts.

Radio buttons and CSS alone filter right and wrong rows. The page's security policy forbids scripts and all requests, so
that the text of a row cannot do anything.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.evaluation.judged import Judged
from dwrl_fast.evaluation.pairs import credit
from dwrl_fast.evaluation.report import Report, Section, sections
from dwrl_fast.evaluation.table import PairTable
from dwrl_fast.scoring import Kind

SAMPLE = 100  # number of right rows shown, and of wrong rows
MOST_THOUGHTS = 4  # thoughts shown per response or comparison
MOST_CHARACTERS = 8000  # characters shown per text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: #8886; --right: #2f7ed8; --wrong: #d8572f; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td:not(:first-child) { font-variant-numeric: tabular-nums; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figure img { background: #fff; max-width: 100%; }
.note { opacity: .75; margin: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .6rem; padding: .5rem; background: #8881;
  font: 13px/1.45 ui-monospace, monospace; }
.row { border-left: 4px solid var(--line); padding: .1rem .8rem; margin: .4rem 0; }
.row.right { border-color: var(--right); } .row.wrong { border-color: var(--wrong); }
.row summary { cursor: pointer; }
.sides { display: flex; flex-wrap: wrap; gap: 1rem; } .sides > div { flex: 1 1 20rem; min-width: 0; }
h4 { margin: .6rem 0 0; }
#show-right:checked ~ .rows .wrong, #show-wrong:checked ~ .rows .right { display: none; }
"""


def page(
    report: Report, table: PairTable, judged: Sequence[Judged], rows: Sequence[Preference], plots: Mapping[str, str],
    seed: int,
) -> str:  # fmt: skip
    """The HTML file. plots: title -> SVG."""
    found = sections(report)
    about = _table(Section("", "", ("", ""), [(name, str(value)) for name, value in report.about.items()]))
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<link rel="icon" href="data:,">',  # otherwise the browser requests one
            f"<title>{html.escape(str(report.about['model']))}</title><style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(str(report.about['model']))}</h1>{about}",
            *map(_section, found[:1]),
            '<h2>Plots</h2><div class="plots">',
            *(_figure(title, svg) for title, svg in plots.items()),
            "</div>",
            *map(_section, found[1:]),
            *_sample(report.kind, table, judged, rows, seed),
            "</body></html>",
            "",
        )
    )


def _figure(title: str, svg: str) -> str:
    name, data = html.escape(title), base64.b64encode(svg.encode()).decode()
    image = f'<img alt="{name}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure><figcaption>{name}</figcaption>{image}</figure>"


def _section(section: Section) -> str:
    note = f'<p class="note">{html.escape(section.note)}</p>' if section.note else ""
    return f"<h2>{html.escape(section.title)}</h2>{note}{_table(section)}"


def _table(section: Section) -> str:
    head = _line("th", section.header) if any(section.header) else ""
    return f"<table>{head}{''.join(_line('td', row) for row in section.rows)}</table>"


def _line(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _sample(kind: Kind, table: PairTable, judged: Sequence[Judged], rows: Sequence[Preference], seed: int) -> list[str]:
    """A sample of `rows` drawn with `seed`, in the order of the files. A row is right if all its pairs are right."""
    right = np.bincount(table.group, credit(table.gap) < 1, len(rows)) == 0
    pairs = np.bincount(table.group, minlength=len(rows)) > 0
    rng = np.random.default_rng(step_seed(seed, "sample of the report", 0))
    shown: list[int] = []
    for places in (np.flatnonzero(right & pairs), np.flatnonzero(~right & pairs)):
        shown += rng.permutation(places)[:SAMPLE].tolist()
    filters = [("all", "all"), ("right", "right"), ("wrong", "not right")]
    return [
        "<h2>Pairs and rankings</h2>",
        f'<p class="note">{len(shown):,} of {int(pairs.sum()):,}, drawn at random, at most {SAMPLE} of a kind; '
        "scores.jsonl has them all.</p>",
        *(
            f'<input type="radio" name="show" id="show-{name}"{" checked" if name == "all" else ""}>'
            f'<label for="show-{name}">{label} </label>'
            for name, label in filters
        ),
        '<div class="rows">',
        *(_row(kind, bool(right[place]), judged[place], rows[place]) for place in sorted(shown)),
        "</div>",
    ]


def _row(kind: Kind, right: bool, judged: Judged, row: Preference) -> str:
    scores = " · ".join(map(_number, judged.scores))
    subset = f" · {judged.subset}" if judged.subset else ""
    summary = html.escape(f"{'right' if right else 'not right'} · {judged.source}{subset} · scores {scores}")
    prompt = "".join(f"<h4>{html.escape(turn['role'])}</h4>{_text(turn['content'])}" for turn in row.prompt)
    sides = "".join(
        f"<div><h4>response {k + 1}, rank {judged.ranks[k]}, score {_number(judged.scores[k])}</h4>{_text(response)}"
        f"{'' if judged.comparisons else _thoughts(kind, judged, k)}</div>"
        for k, response in enumerate(row.responses)
    )
    comparisons = "".join(
        f"<div><h4>shown as A: {i + 1}, as B: {j + 1}</h4>{_thoughts(kind, judged, c)}</div>"
        for c, (i, j) in enumerate(judged.comparisons)
    )
    return (
        f'<details class="row {"right" if right else "wrong"}"><summary>{summary}</summary>{prompt}'
        f'<div class="sides">{sides}</div><div class="sides">{comparisons}</div></details>'
    )


def _thoughts(kind: Kind, judged: Judged, place: int) -> str:
    """The thoughts of one response or comparison with their verdicts; only the verdict if there are no thoughts."""
    verdicts = judged.verdicts[place]
    texts = judged.thoughts[place] if judged.thoughts else []
    found = [f'<p class="note">verdict: {_verdict(kind, verdicts[0])}</p>'] if not texts and judged.comparisons else []
    for n, text in enumerate(texts[:MOST_THOUGHTS]):
        cut = "" if judged.ended[place][n] else ", cut at the limit"
        verdict = _verdict(kind, verdicts[n] if n < len(verdicts) else None)
        found.append(f'<p class="note">thought {n + 1}: {verdict}{cut}</p>{_text(text)}')
    if len(texts) > MOST_THOUGHTS:
        found.append(f'<p class="note">and {len(texts) - MOST_THOUGHTS} more</p>')
    return "".join(found)


def _verdict(kind: Kind, verdict: float | None) -> str:
    if verdict is None:
        return "cannot be read"
    if kind != "comparison":
        return _number(verdict)
    return {1.0: "A", 0.0: "B"}.get(verdict, f"p(A) = {verdict:.3f}")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _text(text: str) -> str:
    cut = f" … ({len(text) - MOST_CHARACTERS:,} characters more)" if len(text) > MOST_CHARACTERS else ""
    return f"<pre>{html.escape(text[:MOST_CHARACTERS])}{cut}</pre>"
