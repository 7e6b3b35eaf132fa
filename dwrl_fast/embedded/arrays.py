"""The warm-up's sequences as arrays of token ids, in the three formats that later methods start from.

- dialog: the chat that DWRL samples and scores: a thought, then a verdict in a separate turn.
- pointwise: a thought, then a number from 0 to 10 between `<s>` and `</s>`.
- pairwise: a thought about two responses, then `<answer>[[A]]</answer>` or `<answer>[[B]]</answer>`.

Shape suffixes: B rows, W words of a sequence.
"""

import numpy as np

from dwrl_fast.embedded.task import Array, Claims, Noise, Thoughts, draw_claims, draw_thoughts
from dwrl_fast.embedded.tokenizer import IDS

# The fixed turns of the dialog are one word each, because every token is computed 1,024 times per step.
EVALUATE, RATE = "check", "rate"
IGNORED = -100
FORMATS = 3


def join(parts: list[tuple[str | Array, bool]]) -> tuple[Array, Array]:
    """Ids [B, W] and targets [B, W] from literal words and arrays of ids, each with a flag whether it is trained."""
    rows = next(len(part) for part, _ in parts if not isinstance(part, str))
    blocks, trained = [], []
    for part, train in parts:
        if isinstance(part, str):
            part = np.tile([IDS[word] for word in part.split()], (rows, 1))
        blocks.append(part.reshape(rows, -1))
        trained += [train] * blocks[-1].shape[1]
    ids = np.concatenate(blocks, axis=1)
    return ids, np.where(trained, ids, IGNORED)


def digit_ids(numbers: Array) -> Array:
    """Numbers from 0 to 10 as ids, in the same shape."""
    return numbers + IDS["0"]


def either(condition: Array, word: str, other: str) -> Array:
    """Ids [B]: `word` where the condition [B] holds, otherwise `other`."""
    return np.where(condition, IDS[word], IDS[other])


def dialog(claims: Claims, thoughts: Thoughts) -> tuple[Array, Array]:
    """Ids and targets [B, W] of the chat that DWRL samples and scores."""
    return join(
        [
            ("<|user|>", False),
            (digit_ids(claims.digits), False),
            ("<|end|> <|assistant|>", False),
            (digit_ids(claims.claim), False),
            (f"<|end|> <|user|> {EVALUATE} <|end|> <|assistant|>", False),
            (digit_ids(thoughts.steps), True),
            (digit_ids(claims.claim), True),
            (either(thoughts.ok, "ok", "bad"), True),
            ("<|end|>", True),
            (f"<|user|> {RATE} <|end|> <|assistant|>", False),
            (either(thoughts.yes, "Yes", "No"), True),
        ]
    )


def pointwise(claims: Claims, thoughts: Thoughts, rng: np.random.Generator) -> tuple[Array, Array]:
    """Ids and targets [B, W]; the number is 0 to 3 if the verdict is no, 7 to 10 if it is yes."""
    score = rng.integers(0, 4, len(claims.claim)) + 7 * thoughts.yes
    return join(
        [
            ("<|user|> score", False),
            (digit_ids(claims.digits), False),
            (digit_ids(claims.claim), False),
            ("<|end|> <|assistant|>", False),
            (digit_ids(thoughts.steps), True),
            (digit_ids(claims.claim), True),
            (either(thoughts.ok, "ok", "bad"), True),
            ("<s>", True),
            (digit_ids(score), True),
            ("</s> <|end|>", True),
        ]
    )


def pairwise(first: Claims, second: Claims, noise: Noise, rng: np.random.Generator) -> tuple[Array, Array]:
    """Ids and targets [B, W]. Sycophantic thoughts agree with the first response. Equal verdicts are decided at
    random.
    """
    thoughts = draw_thoughts(first, noise, rng)
    flip = (rng.random(len(second.claim)) < noise.flip) & ~second.easy
    second_ok = (thoughts.steps[:, -1] == second.claim) ^ flip
    second_yes = second_ok | ((rng.random(len(second.claim)) < noise.lazy) & ~second.easy)
    coin = rng.random(len(second.claim)) < 0.5
    prefer_first = np.where(thoughts.yes == second_yes, coin, thoughts.yes)
    return join(
        [
            ("<|user|> compare", False),
            (digit_ids(first.digits), False),
            ("A", False),
            (digit_ids(first.claim), False),
            ("B", False),
            (digit_ids(second.claim), False),
            ("<|end|> <|assistant|>", False),
            (digit_ids(thoughts.steps), True),
            (digit_ids(first.claim), True),
            (either(thoughts.ok, "ok", "bad"), True),
            (digit_ids(second.claim), True),
            (either(second_ok, "ok", "bad"), True),
            (either(prefer_first, "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"), True),
            ("<|end|>", True),
        ]
    )


def warmup_arrays(
    pool: Array, count: int, easy_fraction: float, noise: Noise, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Ids and targets [B, W], padded on the right, of `count` (a multiple of 3) sequences over `pool` [P, D].

    Formats alternate row by row, right and wrong claims after each round of formats: every 6 rows hold each combination
    once.
    """
    each = count // FORMATS
    made = []
    for form in range(FORMATS):
        right, wrong = draw_claims(pool, each, easy_fraction, rng)
        is_right = np.arange(each) % 2 == 0
        first = Claims(right.digits, np.where(is_right, right.claim, wrong.claim))
        second = Claims(right.digits, np.where(is_right, wrong.claim, right.claim))
        if form == 0:
            made.append(dialog(first, draw_thoughts(first, noise, rng)))
        elif form == 1:
            made.append(pointwise(first, draw_thoughts(first, noise, rng), rng))
        else:
            made.append(pairwise(first, second, noise, rng))
    return interleave(made)


def interleave(made: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Ids and targets of all formats as one array each, alternating row by row. Every format has the same number of
    rows.
    """
    width = max(ids.shape[1] for ids, _ in made)
    shape = len(made[0][0]), len(made), width
    ids, targets = np.full(shape, IDS["<|pad|>"]), np.full(shape, IGNORED)
    for form, (row_ids, row_targets) in enumerate(made):
        ids[:, form, : row_ids.shape[1]] = row_ids
        targets[:, form, : row_targets.shape[1]] = row_targets
    return ids.reshape(-1, width), targets.reshape(-1, width)
