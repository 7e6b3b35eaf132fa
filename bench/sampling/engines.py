"""The timed engines: our two samplers, and TRL's GRPOTrainer."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from bench.harness import peak_memory, timed
from bench.training.trl_update import grpo_trainer
from bench.training.update import as_hugging_face, powers
from dwrl_fast.sampling import Limits, Sampler, TransformersSampler, TreeSampler
from dwrl_fast.scoring import Runtime

DRAWN: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


class Work(NamedTuple):
    """`n` thoughts of exactly `tokens` tokens for each context. The stop token is an id that no model writes, so the
    check for it takes its usual time.
    """

    contexts: list[list[int]]
    n: int
    tokens: int

    @property
    def written(self) -> int:
        """The tokens of all thoughts."""
        return len(self.contexts) * self.n * self.tokens

    @property
    def part(self) -> "Work":
        """The part for sweeps: every fourth pair of contexts, or all if there are few."""
        if len(self.contexts) <= 16:
            return self
        return self._replace(
            contexts=[ids for i in range(0, len(self.contexts), 8) for ids in self.contexts[i : i + 2]]
        )

    def check(self, lengths: list[int]) -> None:
        """Raise ValueError unless these are the right lengths of all thoughts."""
        if lengths != [self.tokens] * (len(self.contexts) * self.n):
            raise ValueError(f"{len(lengths)} thoughts of {min(lengths)} to {max(lengths)} tokens instead of {self}")


class Engine(NamedTuple):
    """One engine. run: runs it and returns its seconds. peak: bytes above the level before the run."""

    note: str
    run: Callable[[], float]
    peak: Callable[[], int | None]


def engine(write: Callable[[], list[int]], work: Work, note: str) -> Engine:
    """An engine from a function in this process that returns the lengths of its thoughts."""

    def checked() -> None:
        work.check(write())

    return Engine(note, partial(timed, checked), partial(peak_memory, checked))


def of_sampler(sampler: Sampler, work: Work, note: str) -> Engine:
    """An engine from one of our samplers."""

    def write() -> list[int]:
        found = sampler.sample(work.contexts, work.n, max_tokens=work.tokens, temperature=1.0, seed=0)
        return [len(thought.ids) for some in found for thought in some]

    return engine(write, work, note)


def never(runtime: Runtime) -> int:
    """An id for the stop token that the model cannot write."""
    return int(runtime.model.lm.config.vocab_size)


def plain_sampler(runtime: Runtime, batch_size: int) -> TransformersSampler:
    """The plain loop."""
    return TransformersSampler(
        runtime.model.lm,
        [never(runtime)],
        runtime.dialog.pad_id,
        batch_size=batch_size,
        autocast=runtime.compute.autocast,
    )


def default_limits(runtime: Runtime) -> Limits:
    """The default limits of a run."""
    assert isinstance(runtime.sampler, TreeSampler)
    return runtime.sampler.limits


def tree_sampler(runtime: Runtime) -> TreeSampler:
    """The sampler over a shared cache."""
    limits, budget = default_limits(runtime), runtime.layout.token_budget
    return TreeSampler(
        runtime.model, [never(runtime)], limits=limits, token_budget=budget, autocast=runtime.compute.autocast
    )


def plain(runtime: Runtime, work: Work) -> Iterator[Engine]:
    """The plain loop with 32, 64 ... concurrent thoughts."""
    rows = len(work.contexts) * work.n
    for size in powers(min(32, rows), rows):
        yield of_sampler(plain_sampler(runtime, size), work, f"{size} thoughts at once")


def generation_trainer(runtime: Runtime, n: int, tokens: int, **options: Any) -> Any:
    """A GRPOTrainer that generates `n` thoughts of `tokens` tokens. options: of its configuration."""
    stop = never(runtime)
    trainer = grpo_trainer(
        as_hugging_face(runtime.model.lm),
        num_generations=n,
        max_completion_length=tokens,
        generation_kwargs={"eos_token_id": stop},
        **options,
    )
    trainer.eos_token_ids = [stop]
    return trainer


def trl(runtime: Runtime, work: Work, cache: str | None) -> Iterator[Engine]:
    """GRPOTrainer's own generation, with transformers' `generate`: batches of 32, 64 ... thoughts. Contexts are sorted
    by length, so that there is little padding.
    """
    rows = [ids for ids in work.contexts for _ in range(work.n)]  # repeated as by its prompt sampler
    trainer = generation_trainer(runtime, work.n, work.tokens, cache_implementation=cache)
    for size in powers(min(32, len(rows)), len(rows)):
        note = f"{size} thoughts a call, {cache or 'dynamic'} cache"
        yield engine(partial(_generate, trainer, rows, work.n, size), work, note)


def _generate(trainer: Any, rows: list[list[int]], n: int, size: int) -> list[int]:
    found: list[int] = []
    for i in range(0, len(rows), size):
        completions, _ = trainer._generate_single_turn(rows[i : i + size], None, {}, n)
        found += map(len, completions)
    return found


def fastest(ladders: Callable[[Work], list[Iterator[Engine]]], work: Work) -> Engine:
    """The engine that is fastest on a part of the work, for all of it. Each runs once, the very first one twice. A
    ladder ends when it no longer gets faster.
    """
    best: tuple[float, Engine] | None = None
    for ladder in ladders(work.part):
        least = math.inf
        for each in ladder:
            if best is None:
                each.run()
            taken = each.run()
            if taken >= least:
                break
            least = taken
            if best is None or taken < best[0]:
                best = (taken, each)
    assert best is not None
    return next(each for ladder in ladders(work) for each in ladder if each.note == best[1].note)
