"""Layouts with two answers and a column that says which one is better."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.formats import BINARY
from dwrl_fast.data.layouts.layout import Layout, Published, found, listed, number
from dwrl_fast.data.layouts.pairs import ours
from dwrl_fast.data.layouts.prompts import content, prompt
from dwrl_fast.data.table_text import Cell, parsed

FIRST, SECOND, TIE = "first", "second", "tie"
BY_NUMBER = {"1": FIRST, "2": SECOND, "tie": TIE}
BY_INDEX = {"0": FIRST, "1": SECOND}
BY_LETTER = {
    **dict.fromkeys(("a", "model_a", "response_a", "a>b", "a>>b", "left"), FIRST),
    **dict.fromkeys(("b", "model_b", "response_b", "b>a", "b>>a", "right"), SECOND),
    **dict.fromkeys(("tie", "tie (bothbad)", "bothbad", "both_bad", "both", "neither", "a=b", "b=a", "c"), TIE),
}
REFERENCES = {"1": FIRST, "0": SECOND}


@dataclass(frozen=True, eq=False)
class Verdict:
    """first, second: possible names of the answer columns. column: possible names of the verdict column. says: the
    meaning of each of its values, in lower case.
    """

    first: str
    second: str
    column: str
    says: Mapping[str, str]

    def __call__(self, row: Published) -> dict[str, Any]:
        """The row as a pair or a tie."""
        sides = content(row.take(self.first)), content(row.take(self.second))
        value = row.take(self.column)
        name = row.name(self.column)
        if name is None:
            raise Unusable(f"null {self.column.split('|')[0]}")
        said = self.says.get(_word(value))
        if said is None:
            raise row.wrong(name, value, f"one of {', '.join(self.says)}")
        return _paired(row, sides, said)

    @property
    def columns(self) -> str:
        """The columns that identify this layout."""
        return f"{self.first} {self.second} {self.column}"


def preference(row: Published) -> dict[str, Any]:
    """A number that is negative if the first answer is better; its absolute value is the margin."""
    sides = content(row.take("response1|response_1")), content(row.take("response2|response_2"))
    value = number(row, "overall_preference", row.take("overall_preference|preference_strength"))
    if value is None:
        raise Unusable("null overall_preference")
    found = _paired(row, sides, FIRST if value < 0 else SECOND if value > 0 else TIE)
    return found | ({"margin": abs(value)} if value and not row.name("margin|magnitude") else {})


def scored(row: Published) -> dict[str, Any]:
    """Two answers with a score each: the higher score is better, and the difference is the margin."""
    names = next((names for names in SCORED if names[0] in row.values), SCORED[0])
    first, second, *scores = (row.take(name) for name in names)
    one, other = (number(row, name, value) for name, value in zip(names[2:], scores, strict=True))
    if one is None or other is None:
        raise Unusable("null score")
    found = _paired(row, (content(first), content(second)), FIRST if one > other else SECOND if other > one else TIE)
    return found | ({"margin": abs(one - other)} if one != other and not row.name("margin|magnitude") else {})


def choice(row: Published) -> dict[str, Any]:
    """Summaries of a post, and the index of the better one."""
    summaries = listed(row, "summaries", row.take("summaries"))
    texts = [each.get("text") if isinstance(each, dict) else each for each in summaries]
    if len(texts) != 2:
        raise Unusable(f"{len(texts)} summaries, but a pair has two")
    said = BY_INDEX.get(_word(row.take("choice")))
    if said is None:
        raise row.wrong("choice", row.values["choice"], "0 or 1")
    info = parsed(row.get("info"))
    asked = (info.get("post") or info.get("article")) if isinstance(info, dict) else None
    return {"prompt": asked} | _paired(row, (texts[0], texts[1]), said)


def one_hot(row: Published) -> dict[str, Any]:
    """Questions and answers as lists, and three verdict columns of which exactly one is 1."""
    questions, first, second = (_texts(row, name) for name in ("prompt", "response_a", "response_b"))
    if not len(questions) == len(first) == len(second):
        raise Unusable("the numbers of answers and questions differ")
    sides = tuple(
        [
            {"role": role, "content": text}
            for asked, answer in zip(questions, answers, strict=True)
            for role, text in (("user", asked), ("assistant", answer))
        ]
        for answers in (first, second)
    )
    marks = [number(row, name, row.take(name)) for name in ("winner_model_a", "winner_model_b", "winner_tie")]
    if sorted(mark or 0.0 for mark in marks) != [0, 0, 1]:
        raise row.wrong(
            "winner_model_a",
            marks,
            "1 in exactly one of winner_model_a, winner_model_b and winner_tie, and 0 in the others",
        )
    both = {"chosen": sides[0], "rejected": sides[1]}
    return _paired(row, (both["chosen"], both["rejected"]), (FIRST, SECOND, TIE)[marks.index(1)], asked={})


def _texts(row: Published, name: str) -> list[Any]:
    value = row.take(name)
    return listed(row, name, Cell(value) if isinstance(value, str) else value)


def _paired(row: Published, sides: tuple[Any, Any], said: str, asked: dict[str, Any] | None = None) -> dict[str, Any]:
    better, worse = sides if said != SECOND else sides[::-1]
    values = (prompt(row) if asked is None else asked) | {"chosen": better, "rejected": worse} | ours(row)
    return values | ({"tie": True} if said == TIE else {})


def _word(value: Any) -> str:
    """A verdict as a lookup key: 1, 1.0, "1" and true are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(int(value) if isinstance(value, bool) else value).strip().lower()[:40]


NUMBERED = Verdict(
    "output_1|response_1|answer_1|completion_1|response1",
    "output_2|response_2|answer_2|completion_2|response2",
    "label|preference|winner|choice|preferred", BY_NUMBER,
)  # fmt: skip
LETTERED = Verdict(
    "response_A|answer_A|output_A|completion_A|orig_response_A",
    "response_B|answer_B|output_B|completion_B|orig_response_B",
    "label|winner|preference|verdict|orig_preference", BY_LETTER,
)  # fmt: skip
ARENA = Verdict(
    "conversation_a|response_a|answer_a", "conversation_b|response_b|answer_b", "winner|preference|label", BY_LETTER
)
COMPLETIONS = Verdict("completion_a|output_a", "completion_b|output_b", "winner|preference|label", BY_LETTER)
INDEXED = Verdict(
    "response_0|answer_0|output_0",
    "response_1|answer_1|output_1",
    "better_response_id|choice|chosen_index|preferred_index|winner_index|better_index",
    BY_INDEX,
)
SCORED = tuple(
    (f"{answer}{a}", f"{answer}{b}", f"score{a}", f"score{b}")
    for answer in ("answer", "response", "output", "completion")
    for a, b in (("_0", "_1"), ("_1", "_2"), ("_a", "_b"), ("_A", "_B"))
)
SHP = Verdict("human_ref_A", "human_ref_B", "labels", REFERENCES)


def _layout(name: str, title: str, verdict: Verdict, becomes: str, **more: Any) -> Layout:
    return Layout(name, title, verdict.columns, becomes, verdict, BINARY, **more)


TIES = "; ties follow `--ties`"
VERDICTS = (
    _layout(
        "label_1_2", "two outputs with a label of 1 or 2", NUMBERED,
        "`output_1` is chosen if `label` is 1, `output_2` if it is 2",
        when=lambda values: not found(values, "overall_preference"),
    ),
    _layout(
        "label_a_b", "two responses with a label such as A>B", LETTERED,
        "`response_A` is chosen for A>B, `response_B` for B>A; A=B is a tie" + TIES,
    ),
    _layout(
        "arena", "arena battles", ARENA,
        "`conversation_a` (or `response_a` to a `prompt`) is chosen if `winner` is model_a; `tie` and "
        "`tie (bothbad)` are ties" + TIES, lost="that both are bad",
    ),
    Layout(
        "arena_lists", "arena battles of lists of questions and answers",
        "prompt response_a response_b winner_model_a winner_model_b winner_tie",
        "`prompt` and the responses are lists (or their JSON), a turn each; the winner's column is 1" + TIES,
        one_hot, BINARY,
    ),
    _layout(
        "completion_winner", "two completions and the winner", COMPLETIONS,
        "`completion_a` is chosen if `winner` is a, `completion_b` if it is b" + TIES,
    ),
    _layout(
        "better_id", "two responses and the number of the better", INDEXED,
        "`response_0` is chosen if `better_response_id` is 0; for another label "
        "`--columns better_response_id=safer_response_id`", lost="the other labels",
    ),
    Layout(
        "overall_preference", "two responses and by how much one is preferred",
        "response1|response_1 response2|response_2 overall_preference|preference_strength",
        "below 0 `response1` is chosen, above 0 `response2`; the size is the margin, 0 a tie" + TIES,
        preference, BINARY, lost="preferences of single annotators",
    ),
    Layout(
        "two_scores", "two answers with a score each", "|".join(dict.fromkeys(first for first, *_ in SCORED)),
        "the answer with the higher `score_0` or `score_1` (as the answers are numbered or lettered) is chosen; the "
        "difference is the margin" + TIES, scored, BINARY,
        when=lambda values: any(all(name in values for name in names) for names in SCORED)
        and not found(values, "label|winner|preference|verdict|better_response_id|overall_preference"),
    ),
    _layout(
        "references", "two references with labels", SHP,
        "`history` is the prompt; `human_ref_A` is chosen if `labels` is 1, `human_ref_B` if it is 0",
        lost="`score_A` and `score_B`",
    ),
    Layout(
        "summaries", "two summaries and a choice", "summaries choice",
        "`info.post` is the prompt; `choice` is the index of the chosen summary", choice, BINARY,
        lost="the other fields of `info`",
    ),
)  # fmt: skip
