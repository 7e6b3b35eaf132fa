"""Thoughts of an untrained model, which are written once and reused."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dwrl_fast.encode.thought import Thought
from dwrl_fast.log import logger
from dwrl_fast.ranks import ALONE, Ranks
from dwrl_fast.sampling.sampler import Sampler

MOST = 10_000  # contexts with a cached thought, where they are not kept in a file


class KeptThoughts:
    """A Sampler that gives one greedy thought per context. `writer` writes it at the first request, and it is then
    cached.

    fingerprint: of the model that `writer` samples from. tokenizer: decodes thoughts for `file`. stop_ids: end a
    thought.
    """

    float32 = True

    def __init__(self, writer: Sampler, fingerprint: str, tokenizer: Any, stop_ids: Sequence[int]):
        self.writer, self.fingerprint, self.tokenizer, self.stop_ids = writer, fingerprint, tokenizer, stop_ids
        self.found: dict[str, list[int]] = {}
        self.file: Path | None = None
        self.most: float = MOST

    def keep_in(self, file: Path, max_tokens: int, ranks: Ranks = ALONE) -> None:
        """Read the thoughts of at most `max_tokens` tokens in `file`, and append future ones to it. With several ranks
        only the first one reads and writes it.

        The file is JSONL: the first line says what determines the thoughts, and each other line is a thought. A file
        whose first line differs is renamed, and a warning says so.
        """
        origin = {"writer": self.fingerprint, "max_completion_length": max_tokens, "stop_ids": sorted(self.stop_ids)}
        self.most = math.inf
        self.found = ranks.from_first(lambda: _read(file, origin))
        self.file = file if ranks.first else None

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


def _read(file: Path, origin: dict[str, Any]) -> dict[str, list[int]]:
    """The thoughts in `file`, which then begins with `origin` and has only intact lines."""
    # A killed run may leave an incomplete line. Other characters than \n that end a line may be within a thought.
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    first, *lines = text.rpartition("\n")[0].split("\n")
    if "\n" in text and (theirs := _parsed(first)) != origin:
        _set_aside(file, theirs, origin)
        lines = []
    found, intact = {}, []
    for number, line in enumerate(lines, start=2):
        match _parsed(line):
            case {"context": str(context), "ids": [*ids]} if ids and all(type(each) is int for each in ids):
                found[context] = ids
                intact.append(line)
            case _:
                logger.warning("%s:%d: this line is damaged; its thought is written again.", file, number)
    part = file.with_name(file.name + ".part")
    part.write_text("".join(line + "\n" for line in [json.dumps(origin), *intact]), encoding="utf-8")
    part.replace(file)
    return found


def _parsed(line: str) -> Any:
    """The value of a line; None if it is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _set_aside(file: Path, theirs: Any, mine: dict[str, Any]) -> None:
    """Rename a file whose thoughts are not those that this run would write, and log why."""
    why = "do not begin with the line that says which model wrote them"
    if isinstance(theirs, dict) and theirs.keys() == mine.keys():
        most = "max_completion_length"
        said = {
            "writer": "are of another model",
            most: f"have at most {theirs[most]} tokens instead of {mine[most]}",
            "stop_ids": "end at other tokens",
        }
        why = " and ".join(text for name, text in said.items() if theirs[name] != mine[name])
    names = (file.with_name(f"{file.stem}.unused{i}{file.suffix}") for i in itertools.count(1))
    aside = file.rename(next(name for name in names if not name.exists()))
    logger.warning(
        "The thoughts in %s %s. They are not used: the file was renamed to %s, and all thoughts are written again.",
        *(file, why, aside.name),
    )


def _key(ids: Sequence[int]) -> str:
    return hashlib.blake2b(np.array(ids, dtype=np.int64).tobytes(), digest_size=16).hexdigest()
