"""The check accounts for every row, with any reader and number of parts. Its figures equal those computed by hand."""

import base64
import gzip
import importlib.util
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dwrl_fast.data import read_preferences
from dwrl_fast.data.check import check, find_overlap
from dwrl_fast.data.counts import prompt_digest
from dwrl_fast.data.fix import fix
from dwrl_fast.data.label_agreement import agreement, fleiss_kappa, krippendorff_alpha, pearson_r
from dwrl_fast.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
relabelled = pytest.mark.skipif(
    importlib.util.find_spec("krippendorff") is None,
    reason="krippendorff, for comparisons labelled twice, is not installed (pip install krippendorff)",
)


def pair(prompt: str = "p", chosen: str = "good", rejected: str = "bad", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows as lines; bytes and texts are written raw."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


MIXED: list[Any] = [
    pair("a"),  # 1
    pair("a", "bad", "good"),  # 2, the other way round
    pair("a"),  # 3, once more
    pair("b", "", "bad"),  # 4
    "nonsense",  # 5
    "",  # 6, blank
    {"prompt": "c", "chosen": "x"},  # 7
    pair("c", "x", 5),  # type: ignore[arg-type]  # 8
    "[1]",  # 9
    '{"prompt": "u", "chosen": "y\\u2028z", "rejected": "\\ud800"}',  # 10
    pair("u", "y\u2028z", "a longer one"),  # 11
    b'{"prompt": "a", "chosen": "\xff", "rejected": "c"}',  # 12
    pair("a", "good", "bad", aspect="brevity"),  # 13, another question
    "truncated {",  # 14
]
REASONS = {
    "not JSON": [5, 14],
    "empty response": [4],
    "no column 'rejected'": [7],
    "'rejected' should hold a string or a list of messages": [8],
    "a list where an object was expected": [9],
    "a lone surrogate, which is not valid text": [10],
    "not UTF-8": [12],
}


@relabelled
def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    found = check(write(tmp_path / "mixed.jsonl", MIXED))
    assert (found.format, found.rows, found.used, found.groups) == ("BINARY", 13, 5, 5)
    assert found.dropped == REASONS
    assert next(iter(found.dropped)) == "not JSON"  # the most first
    assert "--columns rejected=NAME" in found.advice["no column 'rejected'"]
    assert found.prompts == 2
    assert found.shared_prompts == [2, 3, 13]
    assert found.repeated == [3]
    assert found.conflicts == [1, 2, 3]
    assert found.pairs == 5
    assert found.longer_wins == 3 / 5  # lines 1, 3 and 13
    assert found.lengths["response"] == (3, 3, 3, 8, 11, 12)
    assert found.lengths["prompt + longest response"] == (5, 5, 5, 11, 12, 13)  # between the two nearest, rounded down
    assert json.loads(json.dumps(found.to_dict()))["dropped"] == REASONS


def big(path: Path, seed: int = 0) -> Path:
    """A file with good, bad, blank and repeated lines in random order, with carriage returns and a byte-order mark."""
    draw = random.Random(seed)
    rows: list[Any] = []
    for number in range(600):
        kind = draw.random()
        if kind < 0.1:
            rows += [MIXED[draw.randrange(3, 14)]]
        elif kind < 0.2:
            rows += ["", b"  \r", "\t"][: draw.randrange(4)]
        elif kind < 0.3:
            rows.append(pair(f"again {draw.randrange(9)}", *draw.sample(["one", "two", "\u2028 three"], 2)))
        else:
            rows.append(json.dumps(pair(f"{number}", "é" * draw.randrange(1, 90), "x"), ensure_ascii=False) + "\r")
    path.write_bytes(b"\xef\xbb\xbf")
    return write(path, [b"\xef\xbb\xbf" + json.dumps(pair("first")).encode(), *rows, "", "  "])


@relabelled
@pytest.mark.parametrize("stretch", [100, 777, 5000])
def test_many_processes_find_what_one_does(tmp_path: Path, stretch: int) -> None:
    path = big(tmp_path / "big.jsonl", stretch)
    one, many = check(path, processes=1), check(path, processes=2, stretch=stretch)
    assert one.to_dict() == many.to_dict()
    assert np.array_equal(one.counts.rows.all, many.counts.rows.all)
    assert np.array_equal(one.counts.comparisons.all, many.counts.comparisons.all)
    assert one.rows == one.used + sum(map(len, one.dropped.values())) == _not_blank(path)
    for reason, lines in one.dropped.items():  # the lines are the file's own
        if reason == "not JSON":
            texts = path.read_bytes().split(b"\n")
            assert all(texts[line - 1].startswith((b"nonsense", b"truncated")) for line in lines)


def _not_blank(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))


@relabelled
def test_processes_tell_how_far_they_are(tmp_path: Path) -> None:
    path, told = big(tmp_path / "big.jsonl"), list[int]()
    check(path, processes=2, stretch=1000, progress=told.append)
    assert len(told) > 5 and told == sorted(told) and told[-1] == path.stat().st_size


@relabelled
def test_what_cannot_be_divided_is_read_in_one_go(tmp_path: Path) -> None:
    """Completions of one prompt may be anywhere; a gzip file must be read from its start; a wrong mapping is
    reported.
    """
    rows = [{"prompt": f"{i % 7}", "completion": f"{i}", "score": i % 3} for i in range(200)]
    path = write(tmp_path / "single.jsonl", rows)
    found = check(path, processes=2, stretch=500)
    whole = read_preferences(path)
    assert (found.format, found.rows, found.used, found.groups) == ("SINGLE", 200, whole.used, len(whole.rows))
    assert found.notes == dict(whole.notes) and found.shared_prompts == []
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(big(tmp_path / "big.jsonl").read_bytes()))
    one = check(tmp_path / "big.jsonl", processes=1).to_dict()
    assert check(packed, processes=2, stretch=100).to_dict() == one | {"path": str(packed)}
    wrong = check(write(tmp_path / "wrong.jsonl", [pair()] * 99), columns={"margin": "gap"}, processes=2, stretch=200)
    assert (wrong.rows, wrong.used) == (99, 0)
    assert "--columns margin=NAME" in wrong.advice["no column 'gap'"]


@relabelled
@pytest.mark.parametrize("rankings", ["pairs", "plackett_luce"])
def test_rankings_are_compared_two_by_two(tmp_path: Path, rankings: Any) -> None:
    rows = [
        {"prompt": "p", "responses": ["best", "worst one", "middle"], "ranks": [1, 3, 2]},
        {"prompt": "p", "responses": ["middle", "best"], "ranks": [1, 2]},
    ]
    found = check(write(tmp_path / "ranks.jsonl", rows), rankings=rankings)
    assert found.groups == (4 if rankings == "pairs" else 2)
    assert found.pairs == 4 and found.longer_wins == 1 / 4  # middle over best, in the second row
    assert found.conflicts == [1, 2] and found.repeated == []
    assert found.lengths["response"][0] == 4 and len(found.counts.responses) == 5
    assert sorted(found.counts.comparisons.all["strength"].tolist()) == [1, 1, 1, 2]


def test_ties_win_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "responses": ["a", "bbb", "c"], "scores": [1, 1, 2]}]
    found = check(write(tmp_path / "tied.jsonl", rows), ties="keep")
    assert found.groups == 3 and found.pairs == 2 and found.longer_wins == 0.25
    assert check(tmp_path / "tied.jsonl").notes == {"pairs left out: tied": 1}


def test_equal_prompts_alone_have_equal_digests() -> None:
    turns = [
        [{"role": "user", "content": "ab"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "system", "content": "ab"}],
        [{"role": "user", "content": "ab"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "ab"}, {"role": "system", "content": ""}],
        [{"role": "user", "content": "a\x00b"}],
    ]
    assert len({prompt_digest(prompt) for prompt in turns}) == len(turns)  # type: ignore[arg-type]


@relabelled
def test_what_two_files_share(tmp_path: Path) -> None:
    one = check(write(tmp_path / "one.jsonl", [pair("a"), pair("b"), pair("b", "x", "y"), pair("c")]))
    two = check(
        write(tmp_path / "two.jsonl", ["", pair("b", "bad", "good"), pair("d"), pair("c"), pair("c", "v", "w")])
    )
    found = find_overlap(one, two)
    assert (found.prompts, found.first_lines, found.second_lines) == (2, [2, 3, 4], [2, 4, 5])
    assert found.agreement is not None
    # Two comparisons labelled in both files, once equally and once not; counted in both orders.
    assert (found.agreement.comparisons, found.agreement.labels) == (2, 4)
    assert found.agreement.fleiss_kappa == found.agreement.pearson_r == 0
    assert find_overlap(one, check(write(tmp_path / "three.jsonl", [pair("z")]))).agreement is None


# The table of Fleiss (1971) as commonly reprinted: 10 subjects, 14 raters, 5 categories; kappa .210
FLEISS = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
          [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip


@relabelled
def test_agreement_against_values_worked_by_hand() -> None:
    assert fleiss_kappa(np.array(FLEISS)) == pytest.approx(0.2099, abs=5e-5)
    # Two raters of four items, labels 0 and 1: 00, 01, 11, 11. Krippendorff: Do = 2/8, De = 2*3*5/(8*7), alpha = 8/15.
    table = np.array([[2, 0], [1, 1], [0, 2], [0, 2]])
    assert krippendorff_alpha(table) == pytest.approx(1 - (2 / 8) / (30 / 56))
    # Fleiss: P = (1 + 0 + 1 + 1)/4, Pe = (3/8)^2 + (5/8)^2
    assert fleiss_kappa(table) == pytest.approx((3 / 4 - 34 / 64) / (1 - 34 / 64))
    assert pearson_r(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)
    assert math.isnan(fleiss_kappa(np.array([[2, 0], [2, 0]]))) and math.isnan(pearson_r(np.ones(3), np.arange(3.0)))


@relabelled
def test_agreement_of_labels() -> None:
    """Comparison 7 has labels +, +, -; comparison 8 has -, -; comparison 9 one, which counts nowhere."""
    comparisons, strengths = np.array([7, 8, 7, 9, 8, 7]), np.array([1.0, -2, 2, 5, -1, -1])
    found = agreement(comparisons, strengths)
    assert found is not None
    assert (found.comparisons, found.labels, found.fleiss_comparisons, found.fleiss_labels) == (2, 5, 1, 2)
    assert found.fleiss_kappa == 1  # comparison 8, in both orders
    # In both orders there are 5 of each label. Of 7's 6 ordered pairs 2 * 2 disagree, each weighing 1/2.
    assert found.krippendorff_alpha == pytest.approx(1 - (2 * 2 * 2 / 2 / 10) / (2 * 5 * 5 / (10 * 9)))
    x, y = np.array([1, -2, -1, 2]), np.array([2, -1, -2, 1])
    assert found.pearson_r == pytest.approx((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))
    flipped = agreement(comparisons, np.where(comparisons == 7, -strengths, strengths))
    assert flipped == found  # which response is the first does not matter
    assert agreement(np.array([1, 2]), np.array([1.0, 1.0])) is None


@relabelled
def test_fixed_files_hold_every_line(tmp_path: Path) -> None:
    path = big(tmp_path / "big.jsonl")
    found = check(path)
    rows, quarantined = fix(path, found, tmp_path / "good.jsonl")
    good, quarantine = (tmp_path / name for name in ("good.jsonl", "good.quarantine.jsonl"))
    assert (rows, quarantined) == (found.used, found.rows - found.used)
    assert rows + quarantined == _not_blank(path)
    texts = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lost = [json.loads(line) for line in quarantine.read_bytes().splitlines()]
    assert {row["line"] for row in lost} == set(itertools.chain(*found.dropped.values()))
    assert Counter(row["reason"] for row in lost) == {reason: len(lines) for reason, lines in found.dropped.items()}
    for row in lost:
        raw = base64.b64decode(row["raw_base64"]) if "raw_base64" in row else row["raw"].encode()
        assert raw == texts[row["line"] - 1].strip() and ("raw_base64" in row) == (row["reason"] == "not UTF-8")
    bad = {row["line"] for row in lost}
    kept = [line.strip() for number, line in enumerate(texts, start=1) if line.strip() and number not in bad]
    assert good.read_bytes().split(b"\n")[:-1] == kept  # byte for byte
    again = check(good)
    assert (again.rows, again.used, again.dropped) == (found.used, found.used, {})
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        fix(path, found, tmp_path / "good.jsonl")


def test_fix_of_completions_and_of_a_table(tmp_path: Path) -> None:
    """A completion without a counterpart is dropped; rows of Parquet become JSON."""
    rows = [{"prompt": f"{i // 2}", "completion": f"{i}", "score": i} for i in range(9)]
    path = write(tmp_path / "single.jsonl", rows)
    assert fix(path, check(path), tmp_path / "good.jsonl") == (8, 1)
    assert check(tmp_path / "good.jsonl").dropped == {}
    import pyarrow
    from pyarrow import parquet

    table = tmp_path / "rows.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist([pair("é\u2028"), pair("", "x", "y"), pair("c", "same", "same")]), table
    )
    assert fix(table, check(table), tmp_path / "table.jsonl") == (1, 2)
    assert json.loads((tmp_path / "table.jsonl").read_text()) == pair("é\u2028")


def test_nothing_is_left_of_a_fix_that_fails(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(), "nonsense"])
    found = check(path)
    write(path, [pair(), "nonsense", pair("later")])
    with pytest.raises(DataError, match="2 rows when it was checked and 3 now"):
        fix(path, found, tmp_path / "good.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dwrl_fast.data", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@relabelled
def test_the_command(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", MIXED)
    test = write(tmp_path / "[red]test.jsonl", [pair("a"), pair("z")])
    done = run("--check", train, test, "--json", tmp_path / "all.json", "--plot", tmp_path / "lengths.png")
    assert done.returncode == 0, done.stderr
    assert "13 rows read = 5 used + 8 dropped" in done.stdout
    assert "[red]test.jsonl: 2 rows read = 2 used" in done.stdout  # no markup
    assert "1 prompts occur in both files" in done.stdout
    report = json.loads((tmp_path / "all.json").read_text())
    assert report["files"][0]["dropped"] == REASONS and report["overlap"]["second_lines"] == [1]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    done = run("--check", train, "--fix", tmp_path / "good.jsonl")
    assert done.returncode == 0 and "and clean)" in done.stdout
    assert _not_blank(tmp_path / "good.jsonl") == 5 and _not_blank(tmp_path / "good.quarantine.jsonl") == 8


@pytest.mark.parametrize(
    ("rows", "arguments", "status", "said"),
    [
        (["nonsense"], [], 1, "no usable row is left"),
        ([""], [], 1, "no usable row is left"),
        (None, [], 1, "cannot be read"),
        ([pair()], ["--json", "IN"], 2, "exists already"),
        ([pair()], ["--fix", "IN"], 2, "nothing is overwritten"),
        ([pair()], ["--fix", "OUT", "--check", "IN"], 2, "only that one"),
        ([pair()], ["--output_dir", "OUT"], 2, "belongs to --prepare"),
        ([pair()], ["--prepare", "hh"], 2, "one of --check FILE, --prepare"),
    ],
)
def test_how_the_command_ends(
    tmp_path: Path, rows: list[Any] | None, arguments: list[str], status: int, said: str
) -> None:
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        write(path, rows)
    places = {"IN": str(path), "OUT": str(tmp_path / "out.jsonl")}
    done = run("--check", path, *(places.get(argument, argument) for argument in arguments))
    assert (done.returncode, said in " ".join(done.stderr.split())) == (status, True), done.stderr
    assert "Traceback" not in done.stderr


def test_real_files_are_accounted_for(shared: Path) -> None:
    """The rows of each file; the share in which the longer response wins equals that in its README."""
    for name, rows, low, high in (
        ("hh/hh_train", 3632, 0.51, 0.53),
        ("math/gsm8k_real_test", 802, 0.52, 0.58),
        ("if/ultrafeedback_train", 994, 0.46, 0.56),
        ("rmb/rmb_helpful_test", 801, 0.65, 0.68),
        ("if/llmbar", 419, 0.265, 0.275),
    ):
        found = check(shared / f"{name}.jsonl.gz")
        assert (found.rows, found.used, found.dropped) == (rows, rows, {})
        assert low - 0.005 < found.longer_wins < high + 0.005, name
    one, two = (check(shared / f"hh/hh_{split}.jsonl.gz") for split in ("train", "test"))
    assert find_overlap(one, two).prompts == 0


def test_lengths_in_real_tokens(shared: Path) -> None:
    """p50, p95 and maximum of prompt and longest response, as in the README of the data."""
    from dwrl_fast.data.__main__ import dialog_of, tokens

    measure = tokens(dialog_of(str(shared / "tokenizers/qwen2.5")))
    found = check(shared / "if/llmbar.jsonl.gz", measure=measure)
    lengths = found.lengths["prompt + longest response"]
    assert found.unit == "tokens" and (lengths.p50, lengths.p95, lengths.most) == (147, 591, 835)
