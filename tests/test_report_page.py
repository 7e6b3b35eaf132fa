"""The HTML page of a report: its content, the escaping of row texts, and a check in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

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
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rows(count: int = 12) -> tuple[list[Judged], list[Preference]]:
    """Every text that a user or a model wrote is hostile."""
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
    """Headless, with no way to any network."""
    assert BROWSER is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    own = ["--proxy-server=127.0.0.1:9", f"--user-data-dir={folder}/profile", "--allow-file-access-from-files"]
    command = [BROWSER, *quiet, *own, *what, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: the page is read by html.parser alone")
def test_a_browser_shows_it_without_a_complaint(tmp_path: Path) -> None:
    whole = made()
    (tmp_path / "report.html").write_text(whole, encoding="utf-8")
    done = browse(tmp_path / "report.html", tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>taken</title>" not in done.stdout and done.stdout.count("<details") == 12
    # A copy under a policy that lets our own script measure: every plot is drawn, and the buttons hide what they say.
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
