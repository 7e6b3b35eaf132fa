"""`make real`, on a tiny model and a few words."""

import hashlib
import io
import json
import sys
import tarfile
import urllib.error
from pathlib import Path

import pytest
from tiny import tiny_folder

from bench import wordnet
from bench.learning import real
from dwrl_fast.errors import UserError

NOUNS = {
    "00000001": 'a small animal that is kept in houses and barks; "he took the pet for a walk"  ',
    "00000002": "a tall plant with a trunk; it bears leaves  ",
    "00000003": "a dogged person who follows others about  ",  # names the word
    "00000004": "too short  ",
    "00000005": "where water falls from a height into a pool  ",
}
SENSES = """\
dog%1:05:00:: 00000001 1 42
dog%1:05:01:: 00000002 2 9
tree%1:20:00:: 00000002 1 77
dogged%1:18:00:: 00000003 1 5
it%1:10:00:: 00000001 1 5
word%1:10:00:: 00000004 1 5
fall%2:38:00:: 00000005 1 50
waterfall%1:17:00:: 00000005 1 0
"""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    nouns = "  1 This is a notice\n" + "".join(f"{place} 05 n 01 x 0 000 | {text}\n" for place, text in NOUNS.items())
    path = tmp_path / "words.tgz"
    with tarfile.open(path, "w:gz") as files:
        for name, text in ((wordnet.SENSES, SENSES), (wordnet.NOUNS, nouns), (wordnet.NOTICE, "Free.")):
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            files.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(wordnet, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_definitions_of_the_most_frequent_nouns(archive: Path, tmp_path: Path) -> None:
    """No second senses, verbs, words without frequencies, or definitions that contain the word."""
    assert wordnet.write(tmp_path / "out" / "words.jsonl", archive) == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "words.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["chosen"]) for row in rows] == [
        ('What does the word "tree" mean?', "A tall plant with a trunk; it bears leaves."),
        ('What does the word "dog" mean?', "A small animal that is kept in houses and barks."),
    ]
    assert (tmp_path / "out" / "WORDNET-LICENSE").read_text() == "Free."


def test_another_archive_and_none_are_said(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(UserError, match="is not the expected archive: its SHA-256 is"):
        wordnet.fetch(archive)

    def unreachable(address: str, timeout: float) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(wordnet.urllib.request, "urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["real", "--output_dir", "run"])
    with pytest.raises(SystemExit) as ended:
        real.main()
    assert ended.value.code == 3 and "no route" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_it_trains_and_shows_thoughts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """From a user's file, with the time of one rollout batch."""
    rows = [{"prompt": f"{i:03d}", "chosen": f"{i:03d}"[::-1] + "1", "rejected": "0"} for i in range(120)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "HELD_OUT", 10)
    monkeypatch.setenv("COLUMNS", "160")
    given = ["--model", str(tiny_folder(tmp_path / "tiny")), "--data", "mine.jsonl", "--minutes", "0.001"]
    monkeypatch.setattr(sys, "argv", ["real", *given, "--tokens", "4", "--output_dir", "run"])
    real.main()
    said = " ".join(capsys.readouterr().out.split())
    for part in ("Held-out pair accuracy, dwrl, seed 0", "95 % interval", "one greedy thought, and p(Yes) after it"):
        assert part in said
    assert said.count("better: ") == said.count("worse: ") == real.SHOWN
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 1 and (tmp_path / "data" / "on-topic-mine" / "train.jsonl").is_file()
    assert real.pairs("mine.jsonl", tmp_path / "data") == tmp_path / "data" / "on-topic-mine"
    with pytest.raises(UserError, match=r"holds pairs of mine.jsonl, not of other/mine.jsonl: move that folder away"):
        real.pairs("other/mine.jsonl", tmp_path / "data")
