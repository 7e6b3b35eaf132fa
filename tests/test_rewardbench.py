"""RewardBench 1 and 2 against values computed by hand, from files to the headline."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from verdicts import judged_row

from dwrl_fast.config import parse_evaluate
from dwrl_fast.errors import ConfigError, DataError
from dwrl_fast.evaluation.judged import Judged
from dwrl_fast.evaluation.rewardbench import SECTIONS, read_best_of, rewardbench, rewardbench2, ties_score

RIGHT, WRONG, TIE = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]


def rows(*scores: list[float], subset: str, **changes: Any) -> list[Judged]:
    return [judged_row(one, subset=subset, **changes) for one in scores]


def whole(**accuracy: list[list[float]]) -> list[Judged]:
    """Rows of every subset. All are right except in the given subsets."""
    found = {name: [RIGHT] for weights in SECTIONS.values() for name in weights} | accuracy
    return [row for name, scores in found.items() for row in rows(*scores, subset=name)]


def test_the_weights_are_the_benchmarks() -> None:
    """The filtered set has 2,985 examples. math-prm has 447 but counts 984, as much as the six code subsets."""
    counts = {name: count for weights in SECTIONS.values() for name, count in weights.items()}
    assert len(counts) == 23 and sum(counts.values()) - 984 + 447 == 2985
    assert [sum(weights.values()) for weights in SECTIONS.values()] == [358, 456, 740, 1968]
    assert counts["math-prm"] == 984 == sum(count for name, count in counts.items() if name.startswith("hep-"))


def test_sections_and_headline_by_hand() -> None:
    half = [RIGHT, WRONG]
    found = rewardbench(whole(**{"math-prm": half, "mt-bench-med": [WRONG], "donotanswer": half}), "score")
    assert found.parts["Chat Hard"] == 1
    assert found.parts["Reasoning"] == pytest.approx((984 * 0.5 + 984) / 1968) == 0.75
    assert found.parts["Chat"] == pytest.approx((358 - 40) / 358)
    assert found.parts["Safety"] == pytest.approx((740 - 68) / 740)
    assert found.headline == pytest.approx((1 + 0.75 + 318 / 358 + 672 / 740) / 4)
    assert found.details["math-prm"] == 0.5 and found.missing == []


def test_how_many_rows_a_subset_has_does_not_weigh() -> None:
    many = rewardbench(whole(**{"math-prm": [WRONG] * 447}), "score")
    few = rewardbench(whole(**{"math-prm": [WRONG]}), "score")
    assert many.headline == few.headline == pytest.approx((3 + 0.5) / 4)


def test_a_tie_is_wrong_for_scores_and_half_for_verdicts() -> None:
    tied = whole(**{"math-prm": [TIE]})
    assert rewardbench(tied, "score").parts["Reasoning"] == 0.5
    assert rewardbench(tied, "number").parts["Reasoning"] == 0.5
    assert rewardbench(tied, "comparison").parts["Reasoning"] == 0.75


def test_parts_of_it_have_no_headline() -> None:
    found = rewardbench(rows(RIGHT, WRONG, subset="mt-bench-easy"), "score")
    assert found.parts == {"Chat": 0.5} and found.headline is None
    assert len(found.missing) == 22 and "math-prm" in found.missing
    with pytest.raises(DataError, match=r"rows:1: the subset 'maths' is not one of RewardBench's"):
        rewardbench(rows(RIGHT, subset="maths"), "score")


BEST = (1, 2, 2, 2)


def test_best_of_four_shares_a_tie() -> None:
    scores = [[3.0, 1, 2, 0], [1.0, 1, 0, 0], [1.0, 1, 1, 1], [0.0, 1, 0, 0], [-math.inf] * 4]
    found = rewardbench2(rows(*scores, subset="Focus", ranks=BEST))
    assert found.parts["Focus"] == pytest.approx((1 + 1 / 2 + 1 / 4 + 0 + 1 / 4) / 5)


def ties(number: int, tied: list[float], ref: list[float], right: int = 2) -> list[Judged]:
    """In the tied row `right` responses are right; in the reference row one is."""
    ranks = (1,) * right + (2,) * (len(tied) - right)
    return [
        judged_row(tied, ranks, subset="Ties", id=f"tied:{number}"),
        judged_row(ref, (1,) + (2,) * (len(ref) - 1), subset="Ties", id=f"ref:{number}"),
    ]


def test_ties_by_hand() -> None:
    found = ties_score(
        [
            *ties(1, [5.0, 4.0, 1.0], [6.0, 3.0]),  # leads of 3 and 3, a spread of 1: preferred and hard
            *ties(2, [5.0, 4.0, 2.0], [2.0, 1.5]),  # leads of 2 and 0.5, a spread of 1: preferred, not hard
            *ties(3, [5.0, 2.0, 1.0], [2.0, 0.0]),  # a lead of 1, less than the spread of 3
            *ties(4, [5.0, 1.0, 3.0], [0.0, 1.0]),  # neither is right
        ]
    )
    assert found["tied accuracy"] == found["ref accuracy"] == 0.75
    assert (found["preferred"], found["hard"]) == (0.5, 0.25)
    margin = (math.tanh(2) + math.tanh(-0.5) + math.tanh(1 / 3 - 1) + math.tanh(-2 / 4 - 1)) / 4
    assert found["margin"] == pytest.approx(margin)
    score = 0.3 * 0.75 + 0.3 * 0.75 + 0.2 * 0.5 + 0.2 * 0.25 + 0.01 * margin
    assert found["score"] == pytest.approx(score)


def test_ties_without_a_spread() -> None:
    """Right responses have equal scores. The margin is 1 if they lead, and 0 if all scores are equal."""
    assert ties_score(ties(1, [2.0, 2.0, 1.0], [2.0, 1.0]))["score"] == pytest.approx(1.01)
    level = ties_score(ties(1, [2.0, 2.0, 2.0], [2.0, 2.0]))
    assert level["score"] == level["margin"] == 0
    assert ties_score(ties(1, [-math.inf] * 3, [0.0, -math.inf]))["margin"] == 0


def test_ties_pairs_rows_by_their_ids() -> None:
    both, alone = ties(1, [5.0, 4.0, 1.0], [6.0, 3.0]), ties(2, [5.0, 4.0, 1.0], [0.0, 1.0])[:1]
    found = ties_score([*alone, *both[::-1]])
    assert (found["tied accuracy"], found["preferred"], found["hard"]) == (1, 1, 1)
    with pytest.raises(DataError, match="ref:NUMBER or tied:NUMBER, not 'x'"):
        ties_score([judged_row([1.0, 0.0], id="x")])


def test_the_headline_is_the_mean_of_six_subsets() -> None:
    four = ("Factuality", "Precise IF", "Math", "Safety")
    judged = [judged_row([1.0, 0, 0, 0], BEST, subset=name) for name in four]
    judged += rows([0.0, 1, 0, 0], subset="Focus", ranks=BEST)
    assert rewardbench2(judged).headline is None
    whole = rewardbench2([*judged, *ties(1, [5.0, 4.0, 1.0], [6.0, 3.0])])
    assert whole.headline == pytest.approx((4 + 0 + 1 + 0.01 * math.tanh(2)) / 6)
    assert whole.details["tied accuracy"] == 1


def test_nothing_is_ignored_in_rows_of_the_second(tmp_path: Path) -> None:
    file = tmp_path / "rb2.jsonl"
    better = [[{"role": "assistant", "content": "a", "thinking": "So."}]]
    lines = [{"q": "q", "chosen": better, "rejected": ["b"], "system": None, "n": 1}] * 2
    file.write_text(
        "".join(json.dumps(line | ({} if i else {"system": "Be brief."})) + "\n" for i, line in enumerate(lines))
    )
    dataset = read_best_of(str(file), {"prompt": "q"}, None)
    assert dataset.unread.columns == {"system": 1, "n": 2} and dataset.unread.fields == {"thinking": 2}
    assert "columns not read: 'n', 'system'" in dataset.summary and len(dataset.warnings) == 2
    for columns, message in (
        ({"chosn": "x"}, "there is no column 'chosn' to fill; did you mean 'chosen'"),
        ({"prompt": "q", "subset": "domain"}, "no column 'domain' among"),
        ({"prompt": "q", "margin": "n"}, r"the rows are BEST_OF, which has no 'margin'; leave --columns margin=n out"),
        ({"prompt": "q", "id": "q"}, "already mapped"),
    ):
        with pytest.raises(DataError, match=message):
            read_best_of(str(file), columns, None)


@pytest.mark.parametrize("name", ["rewardbench2", "rmbench"])
def test_options_that_rows_read_whole_cannot_use(name: str) -> None:
    base = ["--model_name_or_path", "m", "--dataset_name", "x"]
    for option, value in (("layout", "arena"), ("rankings", "plackett_luce"), ("ties", "keep")):
        with pytest.raises(ConfigError, match=rf"{option} with benchmark = {name}: .* Leave {option} out"):
            parse_evaluate([*base, "--benchmark", name, f"--{option}", value])
        parse_evaluate([*base, "--benchmark", "rewardbench", f"--{option}", value])
    parse_evaluate([*base, "--benchmark", name, "--ties", "drop"])


def test_rows_of_the_second_are_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "rb2.jsonl"
    lines = [
        {"id": "7", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Focus", "num_correct": 1},
        {"id": "tied:0", "prompt": "q", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties", "num_correct": 2},
        {"id": "8", "prompt": "q", "chosen": ["a"], "rejected": [""], "subset": "Focus"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = read_best_of(str(file), {}, None)
    assert [(row.responses, row.ranks, row.subset, row.id) for row in dataset.rows] == [
        (("a", "b", "c", "d"), (1, 2, 2, 2), "Focus", "7"),
        (("a", "b", "c"), (1, 1, 2), "Ties", "tied:0"),
    ]
    assert "1 x empty response (line 3)" in dataset.summary
    assert len(read_best_of(str(file), {}, 1).rows) == 1
    file.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match=r"rb2\.jsonl:1: 'chosen' should hold a list"):
        read_best_of(str(file), {}, None)
