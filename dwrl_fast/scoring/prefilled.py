"""Thoughts that a model which is not trained writes about each response, to be read with it by a scalar head."""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog
from dwrl_fast.encode import Group
from dwrl_fast.sampling import Sampler
from dwrl_fast.scoring.scorer import Progress


class PrefilledThoughts:
    """One greedy thought a response, of at most `max_tokens`, written when it is first needed and kept."""

    def __init__(self, sampler: Sampler, dialog: Dialog, max_tokens: int):
        self.sampler, self.dialog, self.max_tokens = sampler, dialog, max_tokens
        self.found: dict[str, list[int]] = {}
        self.file: Path | None = None

    def keep_in(self, file: Path) -> None:
        """Take up the thoughts that `file` holds (JSONL, one a line), and add to it what will be written."""
        self.file = file
        if not file.exists():
            return
        whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # a killed run may leave half a line
        file.write_text(whole + "\n" * bool(whole), encoding="utf-8")
        for line in whole.splitlines():
            row = json.loads(line)
            self.found[row["context"]] = row["ids"]

    def groups(self, rows: Sequence[Preference], progress: Progress | None) -> list[Group]:
        """One group a preference: K responses with the evaluate turn, the thought and the rate turn after each."""
        dialog = self.dialog
        contexts = [[dialog.context(row.prompt, response, row.aspect) for response in row.responses] for row in rows]
        keys = [[_key(context.ids) for context in of_row] for of_row in contexts]
        pairs = zip(chain.from_iterable(keys), chain.from_iterable(contexts), strict=True)
        missing = {key: context.ids for key, context in pairs if key not in self.found}
        self._write(missing, progress)
        if progress is not None:
            progress(sum(map(len, keys)) - len(missing))
        groups = []
        for row, of_row, ks in zip(rows, contexts, keys, strict=True):
            thoughts = [self.found[key] for key in ks]
            groups.append(
                Group(
                    row,
                    [[dialog.sequence(context, ids)] for context, ids in zip(of_row, thoughts, strict=True)],
                    ended=[[ids[-1] in dialog.stop_ids] for ids in thoughts],
                )
            )
        return groups

    def _write(self, missing: dict[str, list[int]], progress: Progress | None) -> None:
        if not missing:
            return
        written = self.sampler.sample(
            list(missing.values()), 1, max_tokens=self.max_tokens, temperature=0.0, seed=0, progress=progress
        )
        self.found |= {key: thought.ids for key, (thought,) in zip(missing, written, strict=True)}
        if self.file is not None:
            decode = self.dialog.tokenizer.decode
            with self.file.open("a", encoding="utf-8") as file:
                for key in missing:
                    row = {"context": key, "ids": self.found[key], "thought": decode(self.found[key])}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _key(ids: Sequence[int]) -> str:
    return hashlib.blake2b(np.array(ids, dtype=np.int64).tobytes(), digest_size=16).hexdigest()
