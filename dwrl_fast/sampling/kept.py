"""Thoughts of an untrained model, which are written once and reused."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dwrl_fast.encode.thought import Thought
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.sampling.sampler import Sampler

MOST = 10_000  # contexts with a cached thought, where they are not kept in a file


class KeptThoughts:
    """A Sampler that gives one greedy thought per context. `writer` writes it at the first request, and it is then
    cached.

    tokenizer: decodes thoughts for `file`. stop_ids: end a thought.
    """

    float32 = True

    def __init__(self, writer: Sampler, tokenizer: Any, stop_ids: Sequence[int]):
        self.writer, self.tokenizer, self.stop_ids = writer, tokenizer, stop_ids
        self.found: dict[str, list[int]] = {}
        self.file: Path | None = None
        self.most: float = MOST

    def keep_in(self, file: Path, ranks: Ranks = ALONE) -> None:
        """Read the thoughts in `file` (JSONL, one per line), and append future ones to it. With several ranks only the
        first one reads and writes it.
        """
        self.most = math.inf
        self.found = ranks.from_first(lambda: self._read(file))
        self.file = file if ranks.first else None

    @staticmethod
    def _read(file: Path) -> dict[str, list[int]]:
        if not file.exists():
            return {}
        whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # a killed run may leave an incomplete line
        part = file.with_name(file.name + ".part")
        part.write_text(whole + "\n" * bool(whole), encoding="utf-8")
        part.replace(file)
        rows = map(json.loads, whole.splitlines())
        return {row["context"]: row["ids"] for row in rows}

    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        n: int,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Thought]]:
        """See `Sampler.sample`; without log-probs. Raises ValueError unless one greedy thought per context is
        requested.
        """
        if n != 1 or temperature:
            raise ValueError(f"n = {n}, temperature = {temperature}: only one greedy thought per context is kept")
        keys = [_key(ids) for ids in contexts]
        known = {key: ids for key in keys if (ids := self.found.get(key)) is not None}
        missing = {key: ids for key, ids in zip(keys, contexts, strict=True) if key not in known}
        if missing:
            written = self.writer.sample(
                list(missing.values()), 1, max_tokens=max_tokens, temperature=0.0, seed=seed, progress=progress
            )
            new = {key: thought.ids for key, (thought,) in zip(missing, written, strict=True)}
            self._keep(new)
            known |= new
        if progress is not None:
            progress(len(keys) - len(missing))
        return [[Thought(ids, [], ids[-1] in self.stop_ids)] for ids in map(known.__getitem__, keys)]

    def _keep(self, written: dict[str, list[int]]) -> None:
        if len(self.found) > self.most:  # of a judge that scores ever new texts
            self.found = {}
        self.found |= written
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                for key, ids in written.items():
                    row = {"context": key, "ids": ids, "thought": self.tokenizer.decode(ids)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _key(ids: Sequence[int]) -> str:
    return hashlib.blake2b(np.array(ids, dtype=np.int64).tobytes(), digest_size=16).hexdigest()
