"""The embedded task: is the claimed sum of five digits modulo 7 right?

A prompt is five digits in 0..6 and a response claims their sum modulo 7. The chosen response is right. The rejected
one is *hard* (another digit in 0..6) or *easy* (7..9: impossible, so no addition is needed to reject it). Prompts are
split by a hash, so no prompt of the dev or the test split occurs in the warm-up or in the training pairs.

A thought interleaves digits and running sums, restates the claim and says `ok` or `bad`: for 3 1 4 5 0 and the claim 6
it is `3 1 4 4 1 5 6 0 6 6 ok`. All data are arrays of small integers, one row per thought.

Shape suffixes: B rows, D digits of a prompt.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

DIGITS = 5
MODULUS = 7
BUCKETS = {"dev": (0,), "test": (1,), "train": (2, 3, 4, 5, 6, 7)}  # of a prompt's hash, modulo 8

Array = np.ndarray


@dataclass(frozen=True)
class Noise:
    """The errors in the thoughts of the warm-up; every field is a probability."""

    step_error: float = 0.0  # a running sum is replaced by a random digit, and the later sums continue from it
    sycophancy: float = 0.0  # the last running sum becomes the claim
    flip: float = 0.0  # ok and bad are swapped
    lazy: float = 0.0  # the verdict is positive although the thought says bad


@dataclass(frozen=True)
class Claims:
    """B prompts with one claimed answer each."""

    digits: Array  # [B, D]
    claim: Array  # [B]

    @property
    def truth(self) -> Array:
        """[B]: the right answers."""
        return self.digits.sum(1) % MODULUS

    @property
    def easy(self) -> Array:
        """Whether the claim is impossible."""
        return self.claim >= MODULUS


@dataclass(frozen=True)
class Thoughts:
    """One thought per claim, and the verdict after it."""

    steps: Array  # [B, 2 D - 1] the first digit, then digits and running sums alternately
    ok: Array  # [B] bool, the judgement of the thought
    yes: Array  # [B] bool, the verdict


def prompts(split: str) -> Array:
    """All prompts of a split, [P, D], in a fixed order."""
    every = np.array(list(product(range(MODULUS), repeat=DIGITS)))
    hashes = [hashlib.blake2b(bytes(row), digest_size=1).digest()[0] for row in every.astype(np.uint8)]
    return every[np.isin(np.array(hashes) % 8, BUCKETS[split])]


def draw_claims(pool: Array, count: int, easy_fraction: float, rng: np.random.Generator) -> tuple[Claims, Claims]:
    """`count` pairs over prompts of `pool` [P, D], every prompt equally often: (right claims, wrong claims)."""
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])[:count]
    digits = pool[order]
    truth = digits.sum(1) % MODULUS
    hard = (truth + rng.integers(1, MODULUS, count)) % MODULUS
    impossible = rng.integers(MODULUS, 10, count)
    wrong = np.where(rng.random(count) < easy_fraction, impossible, hard)
    return Claims(digits, truth), Claims(digits, wrong)


def draw_thoughts(claims: Claims, noise: Noise, rng: np.random.Generator) -> Thoughts:
    """One thought per claim. Thoughts about easy claims have no sycophancy, flips or lazy verdicts."""
    count = len(claims.claim)
    plain = claims.easy
    sums = np.empty_like(claims.digits)
    sums[:, 0] = claims.digits[:, 0]
    for step in range(1, DIGITS):
        slip = rng.random(count) < noise.step_error
        right = (sums[:, step - 1] + claims.digits[:, step]) % MODULUS
        sums[:, step] = np.where(slip, rng.integers(0, MODULUS, count), right)
    agree = (rng.random(count) < noise.sycophancy) & ~plain
    sums[:, -1] = np.where(agree, claims.claim, sums[:, -1])
    ok = (sums[:, -1] == claims.claim) ^ ((rng.random(count) < noise.flip) & ~plain)
    yes = ok | ((rng.random(count) < noise.lazy) & ~plain)
    steps = np.stack([claims.digits, sums], axis=2).reshape(count, 2 * DIGITS)[:, 1:]
    return Thoughts(steps, ok, yes)


def write_pairs(path: Path, chosen: Claims, rejected: Claims) -> None:
    """Write preference rows as JSON Lines (`write_rows`). The kind is that of the wrong claim."""
    kinds = np.where(rejected.easy, "easy", "hard")
    write_rows(path, zip(chosen.digits, chosen.claim, rejected.claim, kinds, strict=True))


def write_rows(path: Path, rows: Iterable[tuple[Array, object, object, object]]) -> None:
    """Write rows of prompt, chosen response, rejected response and kind as JSON Lines, with message lists under these
    names.
    """
    with path.open("w", encoding="utf-8") as file:
        for digits, chosen, rejected, kind in rows:
            row = {
                "prompt": [{"role": "user", "content": " ".join(map(str, digits))}],
                "chosen": [{"role": "assistant", "content": str(chosen)}],
                "rejected": [{"role": "assistant", "content": str(rejected)}],
                "kind": str(kind),
            }
            file.write(json.dumps(row) + "\n")
