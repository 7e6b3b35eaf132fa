"""Which rows each rollout batch holds: a permutation an epoch, drawn from the seed, computable at any step."""

import functools

import numpy as np

from dwrl_fast.compute import step_seed
from dwrl_fast.log import warn_once


class Order:
    """`steps` batches of `batch_size` row numbers; the last batch of the run may be smaller.

    max_steps: -1 for `epochs` passes over `rows`, else that many batches, over as many epochs as it takes.
    """

    def __init__(self, rows: int, batch_size: int, epochs: int, max_steps: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.total = rows * epochs if max_steps < 0 else max_steps * batch_size
        self.steps = -(-self.total // batch_size)
        if batch_size > rows:
            warn_once(
                f"--rollout_batch_size {batch_size} is more than the {rows} rows there are: a batch holds rows twice, "
                "sampled from the same weights. Lower it, and --minibatch_size with it."
            )
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(step_seed(self.seed, "order", epoch)).permutation(self.rows)

    def minibatches(self, size: int) -> int:
        """How many minibatches of `size` the whole run has."""
        full, rest = divmod(self.total, self.batch_size)
        return full * (self.batch_size // size) + -(-rest // size)

    def __getitem__(self, step: int) -> list[int]:
        places = range(step * self.batch_size, min((step + 1) * self.batch_size, self.total))
        return [int(self.epoch(place // self.rows)[place % self.rows]) for place in places]
