"""Minibatches with the lengths of preference data: real rows if available, otherwise random ids of the same lengths.

A minibatch holds `PAIRS` pairs, or more, at evenly spaced quantiles of length, so that a few pairs represent the file:
with two, the ratio of naive to unique tokens is within 5 % of the whole file's, for thoughts of 40 tokens (hh,
gsm8k_real, rmb; 9 % for ultrafeedback). Thoughts are random, because their content does not affect the time.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.dialog import Context, Dialog, TokenSequence
from dwrl_fast.encode import Group, Thought

SHARED = Path(os.environ.get("DWRL_FAST_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
FILES = {
    "hh": "hh/hh_train.jsonl.gz",
    "gsm8k_real": "math/gsm8k_real_train.jsonl.gz",
    "ultrafeedback": "if/ultrafeedback_train.jsonl.gz",
    "rmb": "rmb/rmb_helpful_train.jsonl.gz",
}
PAIRS, THOUGHTS = 2, 4
SAMPLED = 400  # rows of a file that are encoded to estimate its quantiles
# Tokens under Qwen2.5's template: the beginning of every prompt, the evaluate turn with the thought's header, and
# everything after the thought.
HEADER, EVALUATE, TAIL = 24, 55, 25
# Lengths of the pairs that `real` picks: prompt, both responses, and the common beginning of the responses.
LENGTHS = {
    "hh": [(49, 86, 12, 0), (254, 8, 12, 0)],
    "gsm8k_real": [(93, 66, 50, 0), (110, 108, 108, 26)],
    "ultrafeedback": [(40, 45, 354, 5), (152, 61, 765, 0)],
    "rmb": [(38, 314, 194, 1), (804, 186, 66, 0)],
}


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs without thoughts: the contexts of both responses, the ids after a thought, and the source."""

    contexts: list[tuple[Context, Context]]
    tail: list[int]
    source: str


def pairs(name: str, count: int = PAIRS) -> Pairs:
    """`count` pairs of the data set `name`: real rows if its file and the tokenizer are available, otherwise random
    ids.
    """
    return real(name, count) if (SHARED / FILES[name]).is_file() else drawn(name, count)


@functools.cache  # shared by all models
def real(name: str, count: int = PAIRS) -> Pairs:
    """Rows of the file of `name`, at evenly spaced quantiles of length, under the template of Qwen2.5."""
    from dwrl_fast.models.pretrained import load_tokenizer

    dialog = Dialog(load_tokenizer(str(SHARED / "tokenizers" / "qwen2.5")))
    rows = read_preferences(str(SHARED / FILES[name])).rows
    some = np.sort(np.random.default_rng(0).choice(len(rows), min(SAMPLED, len(rows)), replace=False))
    encoded = []
    for row in (rows[i] for i in some):
        chosen, rejected = (dialog.context(row.prompt, response) for response in row.responses)
        encoded.append((chosen, rejected))
    encoded.sort(key=lambda both: sum(len(context.ids) for context in both))
    picked = [encoded[int((i + 0.5) / count * len(encoded))] for i in range(count)]
    tail = dialog.sequence(picked[0][0], [0]).ids[len(picked[0][0].ids) + 1 :]
    return Pairs(picked, tail, f"{count} pairs of {Path(FILES[name]).name}")


def drawn(name: str, count: int = PAIRS) -> Pairs:
    """Random ids with the lengths in `LENGTHS`, cyclically."""
    header, evaluate, tail = (list(range(1, size + 1)) for size in (HEADER, EVALUATE, TAIL))
    rng = np.random.default_rng(0)
    contexts = [draw(rng, *each, header, evaluate) for each in islice(cycle(LENGTHS[name]), count)]
    return Pairs(contexts, tail, f"{count} pairs as long as those of {Path(FILES[name]).name}, which is not here")


def synthetic(count: int, prompt: int, response: int) -> Pairs:
    """`count` pairs with random prompts and responses, without fixed turns; they share only the prompt."""
    rng = np.random.default_rng(0)
    contexts = [draw(rng, prompt, response, response, 0, [], []) for _ in range(count)]
    return Pairs(contexts, [], f"{count} synthetic pairs")


def draw(
    rng: np.random.Generator,
    prompt: int,
    chosen: int,
    rejected: int,
    common: int,
    header: list[int],
    evaluate: list[int],
) -> tuple[Context, Context]:
    """A pair of these lengths whose responses begin with `common` equal tokens."""
    start = [*header, *_random(rng, prompt - len(header))]
    shared = _random(rng, common)
    responses = ([*shared, *_random(rng, size - common)] for size in (chosen, rejected))
    one, other = (
        Context(
            [*start, *response, *evaluate],
            slice(0, prompt),
            slice(prompt, prompt + len(response)),
            slice(prompt + len(response), prompt + len(response) + len(evaluate)),
        )
        for response in responses
    )
    return one, other


def groups(found: Pairs, thoughts: Sequence[int], vocabulary: int) -> list[Group]:
    """`found` with `THOUGHTS` random thoughts after each response, with the lengths `thoughts` cyclically, and all ids
    mapped below `vocabulary`. Old log-probs are 0; the model fills them later.
    """
    rng, sizes = np.random.default_rng(1), iter(thoughts)
    written = [[_random(rng, next(sizes)) for _ in range(THOUGHTS)] for both in found.contexts for _ in both]
    drawn = [[Thought([i % vocabulary for i in ids], [0.0] * len(ids), True) for ids in some] for some in written]
    return closed(found, drawn, vocabulary)


def closed(found: Pairs, thoughts: Sequence[list[Thought]], vocabulary: int) -> list[Group]:
    """`found` with these thoughts, a list for each response, pair after pair; all ids mapped below `vocabulary`."""
    left = iter(thoughts)
    made = []
    for both in found.contexts:
        some = [next(left) for _ in both]
        sequences = [
            [_close(context, one.ids, found.tail, vocabulary) for one in each]
            for context, each in zip(both, some, strict=True)
        ]
        made.append(Group(Preference((), ("", "")), sequences, some))
    return made


def thought_lengths(mean: float, count: int) -> list[int]:
    """`count` lengths with this mean, distributed like sampled thoughts: log-normal, with the 95th percentile at about
    three medians.
    """
    sizes = np.random.default_rng(2).lognormal(sigma=0.6, size=count)
    return np.maximum(1, np.rint(sizes * mean / sizes.mean())).astype(int).tolist()


def _close(context: Context, thought: list[int], tail: list[int], vocabulary: int) -> TokenSequence:
    ids = [i % vocabulary for i in (*context.ids, *thought, *tail)]
    stop = len(context.ids) + len(thought)
    return TokenSequence(ids, context.prompt, context.response, slice(len(context.ids), stop), slice(stop, len(ids)))


def _random(rng: np.random.Generator, size: int) -> list[int]:
    return rng.integers(1000, 150_000, size).tolist()
