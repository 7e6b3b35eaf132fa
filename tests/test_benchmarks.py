"""RM-Bench's matrix and JudgeBench's totals against values computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from verdicts import judged_row

from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.errors import DataError
from dwrl_fast.evaluation.benchmarks import check_benchmark, judgebench, rmbench
from dwrl_fast.evaluation.rewardbench import read_best_of

RANKS = (1, 1, 1, 2, 2, 2)


def styled(subset: str, *scores: float) -> Any:
    return judged_row([*scores], subset=subset, ranks=RANKS)


def test_the_matrix_of_rmbench_by_hand() -> None:
    rows = [styled("chat", 1, 2, 3, 0.5, 1.5, 2.5), styled("chat", 0, 0, 0, 0, 1, -1)]
    first = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]  # right i against wrong j
    second = [[0, 0, 1]] * 3
    found = rmbench(rows)
    for i in range(3):
        for j in range(3):
            expected = (first[i][j] + second[i][j]) / 2
            assert found.details[f"chosen {i + 1} over rejected {j + 1}"] == expected
    assert found.parts == {"easy": 0.5, "normal": pytest.approx(4 / 6), "hard": pytest.approx(2 / 6)}
    assert found.headline is None and found.missing == ["math", "code", "safety"]
    perfect = [styled(name, 5, 6, 7, 1, 2, 3) for name in ("math", "code", "safety-refuse", "safety-response")]
    whole = rmbench([*rows, *perfect])
    assert whole.parts["hard"] == pytest.approx((1 / 3 + 3) / 4) and whole.details["safety, easy"] == 1
    assert whole.headline == pytest.approx((0.5 + 4 / 6 + 2 / 6 + 9) / 12)


def test_the_totals_of_judgebench_by_hand() -> None:
    rows = [
        judged_row([1.0, 0.0], subset="mmlu-pro-law"),
        judged_row([0.0, 1.0], subset="mmlu-pro-physics"),
        judged_row([1.0, 1.0], subset="livebench-reasoning"),
        judged_row([1.0, 0.0], subset="livebench-math"),
        judged_row([2.0, 0.0], subset="livecodebench"),
    ]
    found = judgebench(rows)
    assert found.parts == {"Knowledge": 0.5, "Reasoning": 0.0, "Math": 1.0, "Coding": 1.0}
    assert found.headline == pytest.approx(3 / 5) and found.details["pairs of Knowledge"] == 2
    assert judgebench(rows[:2]).headline is None


def test_the_files_are_read_as_published_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"id": "1", "prompt": "Why?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat"}
    path.write_text(json.dumps(row))
    rows = read_best_of(str(path), {"subset": "domain"}, None).rows
    check_benchmark("rmbench", rows)
    assert rows[0].responses == ("a", "b", "c", "d", "e", "f") and rows[0].subset == "chat"
    with pytest.raises(DataError, match=r"the subset None is not one of RM-Bench's .*--columns subset=domain"):
        check_benchmark("rmbench", read_best_of(str(path), {}, None).rows)
    path.write_text(json.dumps(row | {"rejected": ["d"]}))
    with pytest.raises(DataError, match="has 3 chosen and 3 rejected"):
        check_benchmark("rmbench", read_best_of(str(path), {"subset": "domain"}, None).rows)
    judged = {"question": "Why?", "response_A": "a", "response_B": "b", "label": "B>A", "source": "mmlu-pro-law"}
    path.write_text(json.dumps(judged))
    found = read_preferences(path, columns={"subset": "source"}).rows
    check_benchmark("judgebench", found)
    assert (found[0].responses, found[0].subset) == (("b", "a"), "mmlu-pro-law")
    with pytest.raises(DataError, match=r"the subset 'x' is not one of JudgeBench's .*--columns subset=source"):
        check_benchmark("judgebench", [Preference(found[0].prompt, ("a", "b"), subset="x")])
