"""The HTML page of a report: its content, the escaping of row texts, and a check in a browser."""

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from verdicts import judged_row, preference

from dwrl_fast.data import Preference
from dwrl_fast.evaluation.figures import figures
from dwrl_fast.evaluation.judged import Judged
from dwrl_fast.evaluation.page import MOST_CHARACTERS, SAMPLE, page
from dwrl_fast.evaluation.report import make_report, markdown
from dwrl_fast.evaluation.units import Units
from dwrl_fast.evaluation.votes import vote_curve

ATTACK = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)></pre></details>\"'&amp; $x$ | `a`"
TAKEN = "document.title='taken'"
MARKUP = [  # without escaping, each of these would be an element or end one
    f"</script><script>{TAKEN}</script>",
    f"</title></style></pre></textarea><script>{TAKEN}</script>",
    f"<svg/onload={TAKEN}>",
    f"<img src=x onerror={TAKEN}>",
    f'<a href="javascript:{TAKEN}" autofocus onfocus={TAKEN}>here</a>',
    f"<details open ontoggle={TAKEN}>",
    f'"><body onload={TAKEN}>',
    f'<iframe srcdoc="<script>parent.{TAKEN}</script>"></iframe>',
    f'<meta http-equiv=refresh content="0;url=javascript:{TAKEN}">',
    f"<math><mtext><style><img src=x onerror={TAKEN}></style></mtext></math>",
    f"<!-- --!><script>{TAKEN}</script>",
    f"]]><![CDATA[<script>{TAKEN}</script>",
    "<base href=javascript:/><form action=javascript:alert(1)><button>send</button></form>",
    "<style>*{display:none}</style>",
]
TEXTS = [  # to a browser, these are only text
    f"{{{{constructor.constructor('{TAKEN}')()}}}} ${{{TAKEN}}} {{% if 1 %}}",
    f"javascript:{TAKEN}",
    f"&lt;script&gt;{TAKEN}&lt;/script&gt; &#60;script&#62;",
    "\u202e\u2066gpj.exe\u2069 \u200f\u2028\u2029",
    "\x1b]0;taken\x07\x1b[2J\x9b31m",
    "a\0b<scr\0ipt>",
    "$\\frac{$ \\$ %s {0} `a` | b",
    "<" * 20_000,
]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rows(count: int = 12) -> tuple[list[Judged], list[Preference]]:
    """Rows in which every text of a user or a model is hostile."""
    rng = np.random.default_rng(0)
    judged, preferences = [], []
    for place in range(count):
        scores = rng.normal(size=2).tolist()
        judged.append(
            judged_row(
                scores,
                source=f"{ATTACK}:{place}",
                subset=f"{ATTACK}{place % 2}",
                verdicts=[[score] * 5 for score in scores],
                thoughts=[[ATTACK] * 5] * 2,
                ended=[[True] * 4 + [False]] * 2,
            )
        )
        preferences.append(
            preference(
                prompt=({"role": "user", "content": ATTACK},),
                responses=(ATTACK + "x" * place, "y" * (MOST_CHARACTERS + 7)),
                source=f"{ATTACK}:{place}",
            )
        )
    return judged, preferences


def made(count: int = 12) -> str:
    judged, preferences = rows(count)
    report, table = make_report(
        judged, preferences, Units.of(preferences), "score", {"model": ATTACK, "data": ATTACK}, 0
    )
    report.votes.extend(vote_curve(judged, "score", [1, 4], 0))
    assert "<script" not in markdown(report).replace("\\<script", "") and "\\| \\`a\\`" in markdown(report)
    return page(report, table, judged, preferences, figures(report, table.gap), 0)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_texts_stay_texts() -> None:
    reader = Reader()
    reader.feed(made())
    assert reader.open == [], "every tag is closed"
    names = {tag for tag, _ in reader.tags}
    assert "script" not in names and not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert "".join(reader.text).count("document.title = 'taken'") > 12 * 4, "and yet all is there to read"
    assert f"… ({7:,} characters more)" in "".join(reader.text)


def hostile(texts: list[str], folder: Path | None = None) -> str:
    """A page with each of `texts` in every place where a text of a user or a model can be."""
    judged, preferences = [], []
    for place, text in enumerate(texts):
        options = {"verdicts": [[0.0, 0.0]] * 2, "thoughts": [[text] * 2] * 2, "ended": [[True, False]] * 2}
        judged.append(judged_row([1.0, 0.0], source=text, subset=text, **options))
        asked = ({"role": "system", "content": text}, {"role": "user", "content": text})
        preferences.append(preference(prompt=asked, responses=(text, f"{place}{text}"), source=text))
    about = {"model": texts[0], "data": "".join(texts)}
    report, table = make_report(judged, preferences, Units.of(preferences), "score", about, 0)
    plots = {} if folder is None else figures(report, table.gap)
    return page(report, table, judged, preferences, plots, 0)


def elements(whole: str) -> Counter[tuple[Any, ...]]:
    """The kinds of elements of a page, with their attributes. Only `style`, `title` and `meta` elements are counted."""

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found[tag, *attrs] += 1

        def handle_comment(self, data: str) -> None:
            found["comment",] += 1

        unknown_decl = handle_comment

    found: Counter[tuple[Any, ...]] = Counter()
    reader = Elements()
    reader.feed(whole)
    reader.close()
    return Counter({kind: count if kind[0] in ("style", "title", "meta") else 1 for kind, count in found.items()})


def test_no_text_becomes_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in combination with the texts around it. Without escaping, every text would be detected."""
    texts = MARKUP + TEXTS
    found = elements(hostile(texts))
    assert found == elements(hostile([f"plain {k}" for k in range(len(texts))]))
    for tag, *attributes in found:
        assert tag != "script" and not any(name.startswith("on") for name, _ in attributes)
        assert not any("javascript:" in str(value) for _, value in attributes)
    monkeypatch.setattr("dwrl_fast.evaluation.page.html", SimpleNamespace(escape=str))
    plain = elements(hostile(["plain"]))
    for text in MARKUP:
        assert elements(hostile([text])) != plain, text


def test_no_text_speaks_to_the_terminal_out_of_markdown() -> None:
    judged = [judged_row([1.0, 0.0], source=text, subset=text) for text in TEXTS]
    rows = [preference(source=text) for text in TEXTS]
    report, _ = make_report(judged, rows, Units.of(rows), "score", {"model": TEXTS[3], "data": TEXTS[4]}, 0)
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\0"} & set(markdown(report))


def test_nothing_is_fetched() -> None:
    reader = Reader()
    reader.feed(made())
    links = [value for _, attrs in reader.tags for name, value in attrs.items() if name in ("src", "href")]
    assert links and all(link is not None and link.startswith("data:") for link in links)
    policy = next(attrs["content"] for tag, attrs in reader.tags if attrs.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "script" not in policy


def test_it_shows_plots_and_a_sample_of_either_kind() -> None:
    reader = Reader()
    whole = made(3 * SAMPLE)
    reader.feed(whole)
    titles = [attrs["alt"] for tag, attrs in reader.tags if tag == "img"]
    assert titles == ["Reliability", "Score differences", "Accuracy by votes", "By subset", "By difference of length"]
    kinds = [str(attrs["class"]) for tag, attrs in reader.tags if tag == "details"]
    assert kinds.count("row right") == kinds.count("row wrong") == SAMPLE
    assert whole.count("thought 4: ") == 2 * 2 * SAMPLE and "and 1 more" in whole and "thought 5" not in whole
    assert whole == made(3 * SAMPLE), "the same bytes again"


def browse(file: Path, folder: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Run a headless browser without network access."""
    assert BROWSER is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    own = ["--proxy-server=127.0.0.1:9", f"--user-data-dir={folder}/profile", "--allow-file-access-from-files"]
    command = [BROWSER, *quiet, *own, *what, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: the page is read by html.parser alone")
@pytest.mark.parametrize("escaping", [True, False], ids=["escaped", "as it is"])
@pytest.mark.parametrize("policy", [True, False], ids=["policy", "no policy"])
def test_no_text_runs_in_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, escaping: bool, policy: bool
) -> None:
    """Escaping alone is sufficient, and so is the policy alone. Without both, the scripts run, so the test can fail."""
    if not escaping:
        monkeypatch.setattr("dwrl_fast.evaluation.page.html", SimpleNamespace(escape=str))
    whole = hostile([*TEXTS, *MARKUP], tmp_path)
    if not policy:
        whole = re.sub(r'<meta http-equiv="Content[^>]*">', "", whole, count=1)
    (tmp_path / "report.html").write_text(whole, encoding="utf-8")
    done = browse(tmp_path / "report.html", tmp_path, "--virtual-time-budget=3000", "--dump-dom")
    ran = "<title>taken</title>" in done.stdout
    assert ran == (not escaping and not policy)
    if escaping:
        assert "CONSOLE" not in done.stderr and "<script" not in done.stdout, done.stderr
    elif policy:
        assert "Content Security Policy" in done.stderr, "scripts stood on the page, and were refused"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: the page is read by html.parser alone")
def test_a_browser_shows_it_without_a_complaint(tmp_path: Path) -> None:
    whole = made()
    (tmp_path / "report.html").write_text(whole, encoding="utf-8")
    done = browse(tmp_path / "report.html", tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>taken</title>" not in done.stdout and done.stdout.count("<details") == 12
    # In a copy without the policy, a script checks that every plot is drawn and that the buttons hide the right rows.
    probe = """<script>addEventListener("load", () => {
      const plots = [...document.images].map(i => i.naturalWidth > 100 && i.naturalHeight > 100);
      const shown = () => [...document.querySelectorAll(".row")].filter(r => r.offsetParent).map(r => r.className);
      const found = {plots, all: shown().length};
      for (const kind of ["right", "wrong"]) {
        document.getElementById("show-" + kind).checked = true;
        found[kind] = [...new Set(shown())].join();
      }
      document.title = "probed " + JSON.stringify(found);
    })</script>"""
    opened = re.sub(r'<meta http-equiv[^>]*">', "", whole).replace("</body>", f"{probe}</body>")
    (tmp_path / "probe.html").write_text(opened, encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browse(tmp_path / "probe.html", tmp_path, "--dump-dom").stdout)
    assert title is not None
    assert title[1] == ('probed {"plots":[true,true,true,true,true],"all":12,"right":"row right","wrong":"row wrong"}')
    browse(tmp_path / "report.html", tmp_path, f"--screenshot={tmp_path}/page.png", "--window-size=1100,1400")
    assert (tmp_path / "page.png").stat().st_size > 50_000
