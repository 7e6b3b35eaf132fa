"""Converts rows of public data sets to this package's rows. One published row may give several rows; the docstring of
each function describes them.

The functions raise Unusable for a row without a comparison; everything else that is left out is counted in `notes`. The
reader checks the results like any other rows.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.messages import transcript
from dwrl_fast.data.preference import Message

Published = Mapping[str, Any]
Rows = list[dict[str, Any]]

HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
CALCULATOR = re.compile(r"<<[^<>]*>>")
ANSWER = re.compile(r"\nA: *(.+)\s*\Z")
ROLES = {"User": "user", "Assistant": "assistant"}
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass(frozen=True)
class DataSet:
    """repository: its name on the hub, or the address of a file. files: the files of a copy, by split; without a test
    split, prompts are held out. train_rows, test_rows: how many rows are drawn; None: all.
    """

    repository: str | None
    files: Mapping[str, str]
    rows: Callable[[Published, Counter[str]], Rows]
    train_rows: int | None = None
    test_rows: int | None = None
    address: str = ""  # where to download it


def hh(row: Published, notes: Counter[str]) -> Rows:
    """Anthropic HH: `chosen` and `rejected` are transcripts with turns headed Human: and Assistant:."""
    return [{side: transcript(row[side]) for side in ("chosen", "rejected")}]


def ultrafeedback(row: Published, notes: Counter[str]) -> Rows:
    """UltraFeedback binarized: message lists that begin with the prompt, and scores, some of which are equal."""
    if row["score_chosen"] == row["score_rejected"]:
        raise Unusable("equal scores: no preference")
    return [{name: row[name] for name in ("chosen", "rejected", "score_chosen", "score_rejected")}]


def ultrainteract(row: Published, notes: Counter[str]) -> Rows:
    """UltraInteract pairs: a trajectory of turns, then a right and a wrong action."""
    prompt = [{"role": turn["from"], "content": turn["value"]} for turn in row["trajectory"]]
    return [{"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"], "aspect": "correctness"}]


def gsm8k(row: Published, notes: Counter[str]) -> Rows:
    """GSM8K's model solutions: a question, the correct solution, and those of four models. Every right solution is
    compared with every wrong one.
    """
    right, wrong = [_solution(row["ground_truth"])], list[str]()
    for solver in SOLVERS:
        solution = _solution(row[solver]["solution"])
        if solution is None:
            notes["solutions left out: no answer at the end"] += 1
        else:
            (right if row[solver]["is_correct"] else wrong).append(solution)
    pairs = [(a, b) for a in dict.fromkeys(right) if a is not None for b in dict.fromkeys(wrong)]
    if not pairs:
        raise Unusable("all solutions are right")
    return [{"prompt": row["question"], "chosen": a, "rejected": b, "aspect": "correctness"} for a, b in pairs]


def helpsteer(row: Published, notes: Counter[str]) -> Rows:
    """HelpSteer2: one response per row, with a helpfulness from 0 to 4; the prompt contains earlier turns."""
    first, *rest = HELPSTEER_TURN.split(row["prompt"])
    prompt = [Message(role="user", content=first)]
    prompt += [Message(role=ROLES[role], content=text) for role, text in zip(rest[::2], rest[1::2], strict=True)]
    while len(prompt) > 1 and not prompt[-1]["content"].strip():  # the header of the response
        prompt.pop()
    return [{"prompt": prompt, "completion": row["response"], "score": row["helpfulness"]}]


def rmb(row: Published, notes: Counter[str]) -> Rows:
    """RMB's pairs: a conversation, a chosen and a rejected answer, and the path of its category."""
    turns = map(_object, row["conversation_input"])
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    better, worse = (_object(row[side])["answer"] for side in ("chosen", "reject"))
    aspect = row["category_path"].split("/")[1].lower()
    return [{"prompt": prompt, "chosen": better, "rejected": worse, "aspect": aspect}]


DATA_SETS: dict[str, DataSet] = {
    "hh": DataSet(
        "Anthropic/hh-rlhf",
        {"train": "h*/train.jsonl.gz", "test": "h*/test.jsonl.gz"},
        hh,
        train_rows=20_000,
        test_rows=1_000,
    ),
    "ultrafeedback": DataSet(
        "HuggingFaceH4/ultrafeedback_binarized",
        {"train": "data/train_prefs-*", "test": "data/test_prefs-*"},
        ultrafeedback,
    ),
    "ultrainteract": DataSet("openbmb/UltraInteract_pair", {"train": "*.parquet"}, ultrainteract, test_rows=1_000),
    "gsm8k": DataSet(
        "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
        "grade_school_math/data/example_model_solutions.jsonl",
        {"train": "grade_school_math/data/example_model_solutions.jsonl"},
        gsm8k,
        test_rows=841,
    ),
    "helpsteer": DataSet("nvidia/HelpSteer2", {"train": "train.jsonl.gz", "test": "validation.jsonl.gz"}, helpsteer),
    "rmb": DataSet(
        None,
        {"train": "RMB_dataset/Pairwise_set/**/*.json"},
        rmb,
        test_rows=800,
        address="git clone https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark",
    ),
}


def _object(value: Any) -> Any:
    """Parse an object: `datasets` returns objects whose keys differ between rows as JSON text."""
    return json.loads(value) if isinstance(value, str) else value


def _solution(text: str) -> str | None:
    """The solution without calculator annotations; None if it does not end with an answer."""
    text = CALCULATOR.sub("", text).strip()
    return ANSWER.sub(r"\nThe answer is: \1", text) if ANSWER.search(text) else None
