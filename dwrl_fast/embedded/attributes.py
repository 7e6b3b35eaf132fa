"""A second task, without serial computation: the better of two texts has more `ok` and fewer `bad`.

A response is eight words, each `ok`, `bad` or a meaningless digit. Its value is the count of `ok` minus that of `bad`;
the two responses of a pair have different values. A tenth of the training labels is wrong; dev and test labels are all
right. A scalar head needs only a linear function of the counts. Prompts are those of the first task, in the same
splits, and have no meaning here.

A thought gives both counts and its judgement: for `ok 4 bad ok 1 6 ok 0` it is `3 1 ok`. The thoughts of the warm-up
miscount and judge by `ok` alone, so the model can learn only from the pairs that `bad` counts against a text.

Shape suffixes: B rows, W words of a response.
"""

from pathlib import Path

import numpy as np

from dwrl_fast.embedded.arrays import EVALUATE, RATE, digit_ids, either, interleave, join
from dwrl_fast.embedded.task import MODULUS, Array, Noise, prompts, write_rows
from dwrl_fast.embedded.tokenizer import IDS, WORDS

LENGTH = 8
LABEL_NOISE = 0.1
SHARES = (0.3, 0.3)  # of `ok` and of `bad` among the words
ENOUGH = 3  # number of `ok` that the warm-up approves; half of the texts have as many


def draw_texts(count: int, rng: np.random.Generator) -> Array:
    """`count` responses as ids [B, W]."""
    kind = rng.random((count, LENGTH))
    filler = digit_ids(rng.integers(0, MODULUS, (count, LENGTH)))
    return np.where(kind < SHARES[0], IDS["ok"], np.where(kind < sum(SHARES), IDS["bad"], filler))


def counts(texts: Array) -> tuple[Array, Array]:
    """The counts of `ok` and of `bad` in `texts` [B, W]: two arrays [B]."""
    return (texts == IDS["ok"]).sum(1), (texts == IDS["bad"]).sum(1)


def value(texts: Array) -> Array:
    """[B]: the count of `ok` minus that of `bad` in texts [B, W]."""
    good, bad = counts(texts)
    return good - bad


def draw_pairs(count: int, label_noise: float, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Chosen and rejected texts, both [B, W], and whether the label is wrong, [B]."""
    first, second = draw_texts(2 * count, rng), draw_texts(2 * count, rng)
    differ = np.flatnonzero(value(first) != value(second))[:count]  # seven eighths of them do
    first, second = first[differ], second[differ]
    flipped = rng.random(count) < label_noise
    swap = ((value(first) < value(second)) ^ flipped)[:, None]
    return np.where(swap, second, first), np.where(swap, first, second), flipped


def write_split(path: Path, split: str, count: int, rng: np.random.Generator) -> None:
    """Write `count` pairs with prompts of the split as JSON Lines."""
    pool = prompts(split)
    asked = pool[rng.integers(0, len(pool), count)]
    noise = LABEL_NOISE if split == "train" else 0.0
    chosen, rejected, flipped = draw_pairs(count, noise, rng)
    kinds = np.where(flipped, "flipped", "true")
    write_rows(path, zip(asked, map(_text, chosen), map(_text, rejected), kinds, strict=True))


def _text(ids: Array) -> str:
    return " ".join(WORDS[i] for i in ids)


def _said(texts: Array, noise: Noise, rng: np.random.Generator) -> Array:
    """Counts of `ok` and of `bad` as a noisy thought gives them, [B, 2]."""
    said = np.stack(counts(texts), 1)
    slip = rng.random(said.shape) < noise.step_error
    return np.where(slip, np.clip(said + rng.choice([-1, 1], said.shape), 0, LENGTH), said)


def attribute_arrays(
    pool: Array, count: int, easy_fraction: float, noise: Noise, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Ids and targets [B, W], padded on the right, of `count` (a multiple of 3) sequences in the three formats, like
    `arrays.warmup_arrays` for the first task. This task has no easy pairs.
    """
    each = count // 3
    digits = digit_ids(pool[rng.integers(0, len(pool), (3, each))])
    first, second = draw_texts(each, rng), draw_texts(each, rng)
    said, other = _said(first, noise, rng), _said(second, noise, rng)
    ok = (said[:, 0] >= ENOUGH) ^ (rng.random(each) < noise.flip)
    yes = ok | (rng.random(each) < noise.lazy)
    undecided = (said[:, 0] == other[:, 0]) | (rng.random(each) < noise.lazy)
    prefer_first = np.where(undecided, rng.random(each) < 0.5, said[:, 0] > other[:, 0])
    score = np.clip(said[:, 0] + rng.integers(0, 3, each), 0, 10)
    verdict = (either(ok, "ok", "bad"), True)
    dialog = join(
        [
            ("<|user|>", False),
            (digits[0], False),
            ("<|end|> <|assistant|>", False),
            (first, False),
            (f"<|end|> <|user|> {EVALUATE} <|end|> <|assistant|>", False),
            (digit_ids(said), True),
            verdict,
            ("<|end|>", True),
            (f"<|user|> {RATE} <|end|> <|assistant|>", False),
            (either(yes, "Yes", "No"), True),
        ]
    )
    pointwise = join(
        [
            ("<|user|> score", False),
            (digits[1], False),
            (first, False),
            ("<|end|> <|assistant|>", False),
            (digit_ids(said), True),
            verdict,
            ("<s>", True),
            (digit_ids(score), True),
            ("</s> <|end|>", True),
        ]
    )
    pairwise = join(
        [
            ("<|user|> compare", False),
            (digits[2], False),
            ("A", False),
            (first, False),
            ("B", False),
            (second, False),
            ("<|end|> <|assistant|>", False),
            (digit_ids(said), True),
            (digit_ids(other), True),
            (either(prefer_first, "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"), True),
            ("<|end|>", True),
        ]
    )
    return interleave([dialog, pointwise, pairwise])
