"""What does a checkpoint cost the training loop? Fifty updates with one save among them, beside fifty without any, on
the CPU's trunk-heavy model.

The save is what the trainer saves: weights and AdamW's moments, copied at once and written beside training; and for
comparison the same save in the loop's way.
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
    """Rounds take the three ways in turn; the medians of their shares count."""
    pairs = lengths.pairs("hh", 2)
    it = setting(MODELS["trunk-heavy"], pairs, lengths.thought_lengths(40, 2 * lengths.THOUGHTS * len(pairs.contexts)))
    policy = Policy(it.runtime, Optimizers(it.runtime.model, it.method, it.method.config, total=10_000))
    (minibatch,) = policy.pack(it.groups, len(it.groups))
    size = sum(tensor.nbytes for tensor in policy.state().values()) / 2**20

    def interval(how: How) -> float:
        """Seconds of the updates, with a save after the first of them."""
        shutil.rmtree(folder, ignore_errors=True)
        saver = Saver(folder, 1, ALONE, beside=how == "beside")
        saver.copies = copies
        started = time.perf_counter()
        for update in range(updates):
            policy.update(it.method.phases[update % 2], minibatch, it.method.loss, 0)
            if update == 0 and how != "none":
                saver.save((1, 0), policy.state(), {})
        assert how == "none" or saver.thread is None or not saver.thread.is_alive(), "the save outlasts the interval"
        seconds = time.perf_counter() - started
        assert how == "none" or saver.finish()
        return seconds

    copies: dict[str, torch.Tensor] = {}
    policy.update(it.method.phases[0], minibatch, it.method.loss, 0)
    shares: dict[How, list[float]] = {"beside": [], "in the way": []}
    base = []
    for _ in range(rounds):
        base.append(interval("none"))
        for how, some in shares.items():
            some.append(interval(how) / base[-1] - 1)
    shutil.rmtree(folder, ignore_errors=True)
    beside, within = (statistics.median(some) for some in shares.values())
    spread = f"{min(shares['beside']):+.1%} to {max(shares['beside']):+.1%}"
    found = f"{beside:+.1%} ({spread}), in the way {within:+.1%}; {size:.0f} MiB, {statistics.median(base):.0f} s"
    return Drill(f"a save beside {updates} updates", f"under {SHARE:.0%}", found, beside < SHARE)
