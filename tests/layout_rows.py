"""Made-up rows of each layout: the published form, and the rows that they must be read as."""

# ruff: noqa: E501 - a row stands on a line of its own, as in a file

from dataclasses import dataclass, field
from typing import Any

ASK, YES, NO = "Why is it?", "Because.", "No idea."
SYSTEM = "Be brief."
USER = {"role": "user", "content": ASK}
GOOD, BAD = {"role": "assistant", "content": YES}, {"role": "assistant", "content": NO}
HUMAN, GPT, GPT_NO = {"from": "human", "value": ASK}, {"from": "gpt", "value": YES}, {"from": "gpt", "value": NO}
TRANSCRIPT = f"\n\nHuman: {ASK}\n\nAssistant:"
PAIR = {"chosen": YES, "rejected": NO}


def parts(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]}


@dataclass(frozen=True)
class Made:
    """rows: each gives the same pair (SINGLE: all rows together). prompt: the turns as (role, content)."""

    rows: list[dict[str, Any]]
    prompt: list[tuple[str, str]] = field(default_factory=lambda: [("user", ASK)])
    margin: float = 0.0
    pairs: int = 1  # a row
    together: bool = False
    tie: dict[str, Any] = field(default_factory=dict)  # changes that make a row a tie


UNDER_SYSTEM = [("system", SYSTEM), ("user", ASK)]
HISTORY = [("user", "Hi"), ("assistant", "Hello."), ("user", ASK)]

MADE: dict[str, Made] = {
    "sharegpt": Made([
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_NO},
        {"conversations": [HUMAN], **PAIR},
        {"conversations": [HUMAN], "chosen": [GPT], "rejected": [GPT_NO]},
        {"conversations": [USER], "chosen": GPT, "rejected": GPT_NO},
    ]),
    "single_messages": Made([{"prompt": USER, "chosen": GOOD, "rejected": BAD}, {"prompt": ASK, "chosen": GOOD, "rejected": BAD}]),
    "content_parts": Made([
        {"prompt": [parts("user", ASK)], "chosen": [parts("assistant", YES)], "rejected": [parts("assistant", NO)]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [parts("assistant", NO)]},
    ]),
    "messages": Made([{"messages": [USER], "chosen": GOOD, "rejected": BAD}, {"messages": [USER], **PAIR}]),
    "openai": Made([{"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}]),
    "alpaca": Made(
        [
            {"instruction": "Say it.", "input": "Now", "system": "", **PAIR},
            {"instruction": "Say it.", "input": "Now", "history": None, **PAIR},
        ],
        [("user", "Say it.\nNow")],
    ),
    "system": Made(
        [{"system": SYSTEM, "question": ASK, **PAIR}, {"prompt": [USER], "system_prompt": SYSTEM, "chosen": [GOOD], "rejected": [BAD]}],
        UNDER_SYSTEM,
    ),
    "named_prompt": Made([{"question": ASK, **PAIR}, {"query": ASK, **PAIR}]),
    "named_answers": Made([{"prompt": ASK, "chosen_response": YES, "rejected_response": NO}, {"question": ASK, "response_j": YES, "response_k": NO}]),
    "transcripts": Made([
        {"chosen": f"{TRANSCRIPT} {YES}", "rejected": f"{TRANSCRIPT} {NO}"},
        {"prompt": TRANSCRIPT, "chosen": f" {YES}", "rejected": f" {NO}"},
    ]),
    "margins": Made(
        [
            {"prompt": ASK, **PAIR, "score_chosen": 5.0, "score_rejected": 2},
            {"prompt": ASK, **PAIR, "chosen-rating": 4, "rejected-rating": 1.0},
        ],
        margin=3.0,
    ),
    "answered": Made([
        {"messages": [USER, GOOD], "rejected_response": NO},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"conversations": [HUMAN, GPT], "rejected": GPT_NO},
    ]),
    "alpaca_list": Made([{"instruction": ASK, "input": "", "output": [YES, NO]}]),
    "label_1_2": Made([
        {"input": ASK, "output_1": YES, "output_2": NO, "label": 1},
        {"instruction": ASK, "output_1": NO, "output_2": YES, "label": 2},
        {"prompt": ASK, "response_1": NO, "response_2": YES, "preference": "2"},
    ]),
    "label_a_b": Made(
        [
            {"question": ASK, "response_A": YES, "response_B": NO, "label": "A>B"},
            {"question": ASK, "response_A": NO, "response_B": YES, "label": "B>A"},
        ],
        tie={"label": "A=B"},
    ),
    "arena": Made(
        [
            {"model_a": "x", "model_b": "y", "winner": "model_a", "conversation_a": [USER, GOOD], "conversation_b": [USER, BAD]},
            {"model_a": "x", "model_b": "y", "winner": "model_b", "conversation_a": [USER, BAD], "conversation_b": [USER, GOOD]},
            {"prompt": ASK, "response_a": NO, "response_b": YES, "winner": "model_b"},
        ],
        tie={"winner": "tie (bothbad)"},
    ),
    "arena_lists": Made(
        [
            {"prompt": f'["{ASK}"]', "response_a": f'["{YES}"]', "response_b": f'["{NO}"]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
            {"prompt": [ASK], "response_a": [NO], "response_b": [YES], "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        ],
        tie={"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
    ),
    "completion_winner": Made([
        {"prompt": ASK, "completion_a": YES, "completion_b": NO, "winner": "a"},
        {"prompt": ASK, "completion_a": NO, "completion_b": YES, "winner": "B"},
    ], tie={"winner": "tie"}),
    "better_id": Made([
        {"prompt": ASK, "response_0": YES, "response_1": NO, "better_response_id": 0, "safer_response_id": 1},
        {"prompt": ASK, "response_0": NO, "response_1": YES, "better_response_id": 1.0},
    ]),
    "overall_preference": Made(
        [
            {"context": [USER], "response1": YES, "response2": NO, "overall_preference": -2},
            {"prompt": ASK, "response1": NO, "response2": YES, "overall_preference": 2},
        ],
        margin=2.0,
        tie={"overall_preference": 0},
    ),
    "two_scores": Made(
        [
            {"prompt": ASK, "response_a": YES, "response_b": NO, "score_a": 3, "score_b": 1.5},
            {"question": {"full_text": ASK}, "answer_0": NO, "answer_1": YES, "score_0": -1.0, "score_1": 0.5},
        ],
        margin=1.5,
        tie={"score_a": 1, "score_b": 1, "score_0": 1, "score_1": 1},
    ),
    "references": Made([
        {"history": ASK, "human_ref_A": YES, "human_ref_B": NO, "labels": 1, "score_A": 1, "score_B": 9},
        {"history": ASK, "human_ref_A": NO, "human_ref_B": YES, "labels": 0},
    ]),
    "summaries": Made([
        {"info": {"post": ASK}, "summaries": [{"text": YES}, {"text": NO}], "choice": 0},
        {"info": {"post": ASK}, "summaries": [{"text": NO}, {"text": YES}], "choice": 1},
    ]),
    "ultrafeedback": Made(
        [
            {"instruction": ASK, "completions": [
                {"response": NO, "overall_score": 2.0, "annotations": {"honesty": {"Rating": "5"}}},
                {"response": YES, "overall_score": 8.5, "annotations": {"honesty": {"Rating": "1"}}},
                {"response": "?", "overall_score": None, "annotations": {"honesty": {"Rating": "N/A"}}},
            ]},
        ],
        margin=6.5,
    ),
    "answers": Made([
        {"question": ASK, "answers": [{"text": NO, "pm_score": 1, "selected": False}, {"text": YES, "pm_score": 2, "selected": True}]},
        {"prompt": TRANSCRIPT, "answers": [{"answer": YES, "rank": 1}, {"answer": NO, "rank": 2}]},
        {"prompt": ASK, "responses": [{"text": NO, "score": 1}, {"text": YES, "score": 2}]},
    ], margin=1.0),
    "generations": Made([
        {"instruction": ASK, "generations": [NO, YES, "?"], "ratings": [1, 3.5, None]},
        {"prompt": ASK, "completions": [YES, NO], "ratings": [4, 1.5]},
    ], margin=2.5),
    "picked": Made([
        {"prompt": ASK, "responses": [NO, YES], "chosen_index": 1},
        {"question": ASK, "answers": [{"text": YES}, {"text": NO}], "best_idx": "0"},
        {"messages": [USER], "outputs": [NO, YES], "preferred_index": 1.0},
    ], margin=1.0),
    "several": Made([
        {"prompt": ASK, "chosen": [YES, "So."], "rejected": [NO]},
        {"prompt": ASK, "chosen": ["So.", YES], "rejected": NO},
        {"prompt": ASK, "chosen": YES, "rejected": [NO, "Hm."]},
    ], pairs=2, margin=1.0),
    "aspect_scores": Made(
        [
            {"prompt": ASK, "response": NO, "helpfulness": 1, "verbosity": 4},
            {"prompt": ASK, "response": YES, "helpfulness": 4, "verbosity": 0},
        ],
        margin=3.0, together=True,
    ),
    "scored": Made([{"prompt": ASK, "response": NO, "rating": 1}, {"prompt": ASK, "response": YES, "rating": 3.5}], margin=2.5, together=True),
    "true_false": Made(
        [{"prompt": [USER], "completion": [BAD], "label": False}, {"prompt": [USER], "completion": [GOOD], "label": True}],
        margin=1.0, together=True,
    ),
}  # fmt: skip
