"""Pairs whose worse response answers a different prompt. The question is: which response belongs to this conversation?
A small model can learn this, even if it cannot learn human preferences.

Prompts are paired: each gets the other's best response as its worse response, and both stay in one file. So every
response is right as often as wrong, and a model that ignores the prompt has an accuracy of one half.
"""

import json
import random
from collections.abc import Collection

from dwrl_fast.data.counts import prompt_digest
from dwrl_fast.data.locations import open_rows
from dwrl_fast.data.preference import Preference
from dwrl_fast.data.reading import Reader
from dwrl_fast.data.split import Split


def on_topic(path: str, seed: int, longest: int | None) -> Split:
    """The pairs made from a preference file of any layout, keyed by the first prompt of each two. longest: maximum
    characters of a prompt with its response. seed: determines which prompts are paired. Raises DataError if the file
    cannot be read.
    """
    found, kept, responses = Split(), dict[int, Preference](), set[str]()
    for outcome in Reader(open_rows(path)).read():
        if outcome.error is not None:
            raise outcome.error
        found.read += len(outcome.dropped) + len(outcome.lines)
        for reason, line in outcome.dropped:
            found.drop(reason, line)
        for preference in outcome.preferences[:1]:
            if reason := _unfit(preference, kept, responses, longest):
                found.drop(reason, *outcome.lines)
            else:
                kept[prompt_digest(preference.prompt)] = preference
                responses.add(preference.responses[0])
                found.used += len(outcome.lines)
    order = list(kept)
    random.Random(f"on-topic {seed}").shuffle(order)
    for first, other in zip(order[::2], order[1::2], strict=False):
        found.prompts[first] = [_row(kept[a], kept[b]) for a, b in ((first, other), (other, first))]
    if len(order) % 2:
        lines = kept[order[-1]].lines
        found.drop("no other row is left to take a response from", *lines)
        found.used -= len(lines)
    return found


def _unfit(preference: Preference, kept: Collection[int], responses: Collection[str], longest: int | None) -> str:
    characters = sum(len(turn["content"]) for turn in preference.prompt) + len(preference.responses[0])
    if longest is not None and characters > longest:
        return f"prompt and response have over {longest:,} characters"
    if prompt_digest(preference.prompt) in kept:
        return "its prompt occurs in an earlier row"
    return "its response occurs in an earlier row" if preference.responses[0] in responses else ""


def _row(preference: Preference, other: Preference) -> str:
    row = {"prompt": list(preference.prompt), "chosen": preference.responses[0], "rejected": other.responses[0]}
    return json.dumps(row, ensure_ascii=False)
