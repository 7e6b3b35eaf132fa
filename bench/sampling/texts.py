"""The contexts for sampling: both responses of real hh pairs, or random ids if these are not available."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.training import lengths
from dwrl_fast.data import read_preferences
from dwrl_fast.dialog import Dialog

# Tokens of a context, including the evaluate turn and the chat template (80 to 90 tokens for SmolLM2).
BOUNDS = {"long": (300, 400), "short": (1, 130)}
# Tokens of the prompt, of each response, and of their common beginning.
DRAWN = {"long": (230, 50, 35, 0), "short": (40, 25, 15, 0)}


class Texts(NamedTuple):
    """contexts: both contexts of a pair are adjacent; pairs are sorted by length."""

    contexts: list[list[int]]
    source: str

    def folded(self, vocabulary: int) -> "Texts":
        """A copy with all ids mapped below `vocabulary`."""
        return self._replace(contexts=[[i % vocabulary for i in ids] for ids in self.contexts])


@functools.cache
def texts(kind: str, pairs: int, model: Path) -> Texts:
    """The contexts of `pairs` pairs, for a `kind` of BOUNDS, with the chat template of the model in the folder
    `model`.
    """
    file = lengths.SHARED / lengths.FILES["hh"]
    if not (file.is_file() and (model / "tokenizer.json").is_file()):
        return drawn(kind, pairs)
    from dwrl_fast.models.pretrained import load_tokenizer

    dialog, rows = Dialog(load_tokenizer(str(model))), read_preferences(str(file)).rows
    least, most = BOUNDS[kind]
    found: list[list[list[int]]] = []
    for i in np.random.default_rng(0).permutation(len(rows)):
        both = [dialog.context(rows[i].prompt, response).ids for response in rows[i].responses]
        if all(least <= len(ids) <= most for ids in both):
            found.append(both)
            if len(found) == pairs:
                break
    return _flat(found, f"{len(found)} pairs of {file.name}")


def drawn(kind: str, pairs: int) -> Texts:
    """Random ids with the lengths of such pairs."""
    rng = np.random.default_rng(0)
    header, evaluate = (list(range(1, size + 1)) for size in (lengths.HEADER, lengths.EVALUATE))
    found = [[context.ids for context in lengths.draw(rng, *DRAWN[kind], header, evaluate)] for _ in range(pairs)]
    return _flat(found, f"{pairs} drawn pairs, for hh or the model's tokenizer is not here")


def _flat(pairs: list[list[list[int]]], source: str) -> Texts:
    pairs = sorted(pairs, key=lambda both: sum(map(len, both)))
    return Texts([ids for both in pairs for ids in both], source)
