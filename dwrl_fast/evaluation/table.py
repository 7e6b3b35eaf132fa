"""A flat table of all ordered pairs of the judged rows, and figures over subsets of them.

A row with several pairs counts once: each of its pairs has weight one over their number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwrl_fast.data import Preference
from dwrl_fast.data.mixture import short_names
from dwrl_fast.evaluation.judged import Judged, score_table
from dwrl_fast.evaluation.pairs import credit, score_gaps
from dwrl_fast.evaluation.sources import source_of
from dwrl_fast.evaluation.units import Floats, Units

LENGTH_BINS = 5
MOST_TURNS = 5  # this many turns and more form one class


@dataclass(frozen=True, slots=True)
class PairTable:
    """P pairs. group: [P], the index into `judged`. gap: [P], score of the better minus that of the worse, nats.
    longer: [P], characters of the better response minus those of the worse. units: of the pairs.
    """

    group: NDArray[np.int64]
    gap: Floats
    longer: NDArray[np.int64]
    units: Units

    @classmethod
    def of(cls, judged: Sequence[Judged], rows: Sequence[Preference], units: Units) -> "PairTable":
        """units: of `judged` and `rows`, which are the same groups."""
        found = score_gaps(score_table(judged), [one.ranks for one in judged])
        sizes = [[len(response) for response in one.responses] for one in rows]
        longer = [sizes[g][b] - sizes[g][w] for g, b, w in zip(found.group, found.better, found.worse, strict=True)]
        return cls(found.group, found.gap, np.array(longer, dtype=np.int64), units.at(found.group))


@dataclass(frozen=True, slots=True)
class Slice:
    """A named subset of the pairs. Accuracies are as in `PairReport`.

    longer_wins: the accuracy of always choosing the longer response.
    """

    name: str
    pairs: int
    rows: int
    accuracy: float
    low: float
    high: float
    ties: int
    longer_wins: float


def slice_of(name: str, table: PairTable, chosen: NDArray[np.bool_], seed: int) -> Slice:
    """The figures of the `chosen` pairs. chosen: [P], at least one True."""
    units, gap = table.units.part(chosen), table.gap[chosen]
    low, high = units.interval(credit(gap), seed)
    return Slice(
        name,
        pairs=len(gap),
        rows=units.rows,
        accuracy=units.mean(credit(gap)),
        low=low,
        high=high,
        ties=int((gap == 0).sum()),
        longer_wins=units.mean(credit(table.longer[chosen])),
    )


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of the pairs. place: [P], the index into `names` of each pair; -1 for none."""

    by: str
    names: list[str]
    place: NDArray[np.int64]

    def slices(self, table: PairTable, seed: int) -> list[Slice]:
        """The figures of each name that has pairs."""
        chosen = [(name, self.place == place) for place, name in enumerate(self.names)]
        return [slice_of(name, table, some, seed) for name, some in chosen if some.any()]


def partitions(table: PairTable, judged: Sequence[Judged], rows: Sequence[Preference]) -> Iterator[Partition]:
    """Partitions by source, subset, number of turns and difference of length, without those that put all pairs into one
    part.
    """
    sources = [source_of(row) for row in rows]
    short = short_names(list(dict.fromkeys(sources)))
    by_row: dict[str, list[str | None]] = {
        "source": [short[source] for source in sources],
        "subset": [one.subset for one in judged],
        "turns": [_turns(row) for row in rows],
    }
    for by, labels in by_row.items():
        names = list(dict.fromkeys(label for label in labels if label is not None))
        names = sorted(names) if by == "turns" else names
        places = {name: place for place, name in enumerate(names)}
        if len(set(labels)) > 1:
            yield Partition(by, names, np.array([places.get(str(label), -1) for label in labels])[table.group])
    found = length_bins(table.longer)
    if len(found.names) > 1:
        yield found


def length_bins(longer: NDArray[np.int64]) -> Partition:
    """Five bins with about equally many pairs, by the characters of the better response minus those of the worse."""
    edges = np.unique(np.quantile(longer, np.linspace(0, 1, LENGTH_BINS + 1), method="nearest"))
    bins = np.clip(np.searchsorted(edges, longer, side="right") - 1, 0, max(len(edges) - 2, 0))
    _, place = np.unique(bins, return_inverse=True)
    within = [longer[place == i] for i in range(place.max() + 1)]
    return Partition("length", [f"{some.min():+d} to {some.max():+d}" for some in within], place)


def _turns(row: Preference) -> str:
    count = sum(turn["role"] == "user" for turn in row.prompt)
    return f"{count}" if count < MOST_TURNS else f"{MOST_TURNS} or more"
