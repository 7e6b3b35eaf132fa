"""Measures the cost of a checkpoint for the training loop: fifty updates with one save, compared with fifty without, on
the CPU's trunk-heavy model.

The save has the data of a real checkpoint: weights and AdamW's moments, copied at once and written in the background.
For comparison the same save is also made in the foreground.
"""

import shutil
import statistics
import time
from pathlib import Path
from typing import Literal

import torch

from bench.reliability.drill import Drill
from bench.training import lengths
from bench.training.step import MODELS
from bench.training.update import setting
from dwrl_fast.ranks import ALONE
from dwrl_fast.training.optimizer import Optimizers
from dwrl_fast.training.policy import Policy
from dwrl_fast.training.saving import Saver

SHARE = 0.05
How = Literal["none", "beside", "in the way"]


def cost(folder: Path, updates: int, rounds: int) -> Drill:
    """Rounds run the three variants alternately; the result is the median of their shares."""
    pairs = lengths.pairs("hh", 2)
    it = setting(MODELS["trunk-heavy"], pairs, lengths.thought_lengths(40, 2 * lengths.THOUGHTS * len(pairs.contexts)))
    policy = Policy(it.runtime, Optimizers(it.runtime.model, it.method, it.method.config, total=10_000))
    (minibatch,) = policy.pack(it.groups, len(it.groups))
    size = sum(tensor.nbytes for tensor in policy.state().values()) / 2**20

    def interval(how: How) -> tuple[float, float, float]:
        """Run the updates, with a save after the first one. Returns seconds, CPU seconds of this process, and seconds
        that the save blocked the loop.
        """
        shutil.rmtree(folder, ignore_errors=True)
        saver, held = Saver(folder, 1, ALONE, beside=how == "beside"), 0.0
        saver.copies = copies
        started, taken = time.perf_counter(), time.process_time()
        for update in range(updates):
            policy.update(it.method.phases[update % 2], minibatch, it.method.loss, 0)
            if update == 0 and how != "none":
                begun = time.perf_counter()
                saver.save((1, 0), policy.state(), {})
                held = time.perf_counter() - begun
        assert saver.thread is None or not saver.thread.is_alive(), "the save takes longer than the interval"
        found = time.perf_counter() - started, time.process_time() - taken, held
        assert how == "none" or saver.finish()
        return found

    copies: dict[str, torch.Tensor] = {}
    policy.update(it.method.phases[0], minibatch, it.method.loss, 0)
    rows: dict[How, list[tuple[float, float, float]]] = {"none": [], "beside": [], "in the way": []}
    for _ in range(rounds):
        for how, some in rows.items():
            some.append(interval(how))
    shutil.rmtree(folder, ignore_errors=True)
    seconds = statistics.median(row[0] for row in rows["none"])

    def share(how: How, column: int) -> float:
        """The share relative to the same round without a save; for the last column, relative to the interval."""
        pairs = zip(rows[how], rows["none"], strict=True)
        return statistics.median(a[2] / b[0] if column == 2 else a[column] / b[column] - 1 for a, b in pairs)

    found = f"{share('beside', 0):+.1%} of the time, {share('beside', 1):+.1%} of CPU time, the loop blocked for "
    found += (
        f"{share('beside', 2):.1%}; in the foreground {share('in the way', 0):+.1%}, {share('in the way', 2):.1%}; "
    )
    found += f"{size:.0f} MiB, intervals of {seconds:.0f} s"
    return Drill(f"a save beside {updates} updates", f"under {SHARE:.0%}", found, share("beside", 0) < SHARE)
