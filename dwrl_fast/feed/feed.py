"""Chooses the rows of each rollout batch, from one file or from several with weights."""

from collections.abc import Sequence
from typing import Any

from dwrl_fast.data import Preference
from dwrl_fast.data.mixture import short_names
from dwrl_fast.errors import ConfigError
from dwrl_fast.feed.source import Source
from dwrl_fast.log import warn_once


class Feed:
    """`steps` batches of `batch_size` rows; the last batch of the run may be smaller.

    weights: each source's share, in any unit. max_steps: the number of batches, over as many passes as needed; or -1
    for `epochs` epochs, each with as many rows as all sources together (with one source: a pass over it).
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
        """The number of minibatches of `size` in the whole run."""
        full, rest = divmod(self.total, self.batch_size)
        return full * (self.batch_size // size) + -(-rest // size)

    @property
    def drawn(self) -> int:
        """The number of rows given so far, over all sources."""
        return sum(source.drawn for source in self.sources)

    def next(self) -> list[Preference]:
        """The rows of the next batch."""
        return [self._turn().draw() for _ in range(min(self.batch_size, self.total - self.drawn))]

    def _turn(self) -> Source:
        """The source of the next row. After any number t of rows, each source has given its share of t to within one
        row.

        The rule is Tijdeman's (The chairman assignment problem, 1980): of the sources that are far enough behind, take
        the one with the earliest deadline.
        """
        if len(self.sources) == 1:
            return self.sources[0]
        place, near = self.drawn + 1, 1 / (2 * len(self.sources) - 2)
        behind = [weight * place - source.drawn for weight, source in zip(self.weights, self.sources, strict=True)]
        # The source that is furthest behind is always far enough behind, whatever rounding does.
        due = [i for i, rows in enumerate(behind) if rows >= min(near, max(behind))]
        return self.sources[min(due, key=lambda i: (1 - near - behind[i]) / self.weights[i])]

    def identity(self) -> Any:
        """The identity of the rows of this run: that of the source, or of each source with its weight."""
        if len(self.sources) == 1:
            return self.sources[0].identity()
        return [[weight, source.identity()] for weight, source in zip(self.weights, self.sources, strict=True)]

    def state(self) -> list[dict[str, Any]]:
        """The position of the feed between two batches, as JSON. Raises DataError if a streamed file was changed."""
        return [source.state() for source in self.sources]

    def misfit(self, state: list[dict[str, Any]], batches: int, identity: Any) -> str:
        """Why this feed cannot continue from the `state` of a feed with `identity` after `batches` batches, in words;
        empty if it can.
        """
        here = len(self.sources)
        if len(state) != here:
            return f"the number of files or data sets was {len(state)}, is {here}"
        ways = "in memory", "as a stream"
        for source, each in zip(self.sources, state, strict=True):
            if (was := "epoch" in each) != source.streamed:
                return f"the checkpoint read its rows {ways[was]}, and this run reads {source.name} {ways[not was]}"
        if any(source.streamed for source in self.sources) and identity != self.identity():
            return "positions in a stream hold only for the same files, read with the same options"
        drawn, left = sum(each["drawn"] for each in state), self.steps - batches
        if left > 0 and self.total - drawn <= (left - 1) * self.batch_size:
            return (
                f"{drawn} of the {self.total} rows of this run were used already, too many for {left} further batches"
            )
        return ""

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Continue from a `state` of an equal feed. Raises CheckpointError or DataError like the sources."""
        for source, each in zip(self.sources, state, strict=True):
            source.restore(each)

    def result(self) -> dict[str, Any]:
        """The entry for `result.json`: the number of groups (None if a stream has not reached the end of its file), and
        with several sources also the rows drawn from each.
        """
        sizes = [source.rows for source in self.sources]
        each = {self.names[source.name]: {"rows": source.rows, "drawn": source.drawn} for source in self.sources}
        rows = None if None in sizes else sum(size or 0 for size in sizes)
        return {"rows": rows, **({"sources": each} if len(self.sources) > 1 else {})}
