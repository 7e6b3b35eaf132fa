"""Which rows each rollout batch holds: of one file, or of several by their weights."""

from collections.abc import Sequence
from typing import Any

from dwrl_fast.data import Preference
from dwrl_fast.data.mixture import short_names
from dwrl_fast.errors import ConfigError
from dwrl_fast.feed.source import Source
from dwrl_fast.log import warn_once


class Feed:
    """`steps` batches of `batch_size` rows, in turn; the last batch of the run may be smaller.

    weights: each source's share, in any unit. max_steps: -1 for `epochs` epochs, each of as many rows as the sources
    have together (of one source, a pass over it); else that many batches, over as many passes as it takes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        *,
        batch_size: int,
        epochs: int,
        max_steps: int,
    ):
        self.sources, self.batch_size = sources, batch_size
        self.weights = [weight / sum(weights) for weight in weights]
        sizes = [source.rows for source in sources]
        if max_steps >= 0:
            self.total = max_steps * batch_size
        elif None in sizes:
            raise ConfigError("the number of rows of a stream is not known in advance: give --max_steps")
        else:
            self.total = epochs * sum(size or 0 for size in sizes)
        self.steps = -(-self.total // batch_size)
        self.names = short_names([source.name for source in sources])
        for source, weight in zip(sources, self.weights, strict=True):
            if source.rows is not None and batch_size * weight > source.rows:
                warn_once(
                    f"--rollout_batch_size {batch_size} takes {batch_size * weight:.0f} rows of {source.name}, which "
                    f"has {source.rows}: a batch then holds some rows twice, sampled from the same weights. Lower it, "
                    "and --minibatch_size with it."
                )

    def minibatches(self, size: int) -> int:
        """How many minibatches of `size` the whole run has."""
        full, rest = divmod(self.total, self.batch_size)
        return full * (self.batch_size // size) + -(-rest // size)

    @property
    def drawn(self) -> int:
        """The rows given so far, over all sources."""
        return sum(source.drawn for source in self.sources)

    def next(self) -> list[Preference]:
        """The rows of the next batch."""
        return [self._turn().draw() for _ in range(min(self.batch_size, self.total - self.drawn))]

    def _turn(self) -> Source:
        """Whose turn it is: after any number t of rows, each source has given its share of t to within one row.

        The rule is Tijdeman's (The chairman assignment problem, 1980): of the sources that are far enough behind, the
        one that must be served the soonest.
        """
        if len(self.sources) == 1:
            return self.sources[0]
        place, near = self.drawn + 1, 1 / (2 * len(self.sources) - 2)
        behind = [weight * place - source.drawn for weight, source in zip(self.weights, self.sources, strict=True)]
        # The most that is behind is always far enough; rounding must not say otherwise.
        due = [i for i, rows in enumerate(behind) if rows >= min(near, max(behind))]
        return self.sources[min(due, key=lambda i: (1 - near - behind[i]) / self.weights[i])]

    def identity(self) -> Any:
        """What makes the rows of this run these rows: one source's own identity, else each one's with its weight."""
        if len(self.sources) == 1:
            return self.sources[0].identity()
        return [[weight, source.identity()] for weight, source in zip(self.weights, self.sources, strict=True)]

    def state(self) -> list[dict[str, Any]]:
        """As JSON, how far the feed is between two batches. Raises DataError if a streamed file was changed."""
        return [source.state() for source in self.sources]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Go on from what `state` gave of a feed like this one. Raises CheckpointError or DataError as from the
        sources.
        """
        for source, each in zip(self.sources, state, strict=True):
            source.restore(each)

    def result(self) -> dict[str, Any]:
        """What `result.json` holds of it: the groups there are (None if a stream has not come to its file's end),
        and of each of several sources also the rows drawn.
        """
        sizes = [source.rows for source in self.sources]
        each = {self.names[source.name]: {"rows": source.rows, "drawn": source.drawn} for source in self.sources}
        rows = None if None in sizes else sum(size or 0 for size in sizes)
        return {"rows": rows, **({"sources": each} if len(self.sources) > 1 else {})}
