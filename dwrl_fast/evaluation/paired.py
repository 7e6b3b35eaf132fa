"""Two models on the same preferences: by how much one is better, and how sure that is."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dwrl_fast.evaluation.calibration import sigmoid
from dwrl_fast.evaluation.pairs import counted, credit, score_gaps
from dwrl_fast.evaluation.units import Units


@dataclass(frozen=True, slots=True)
class PairedReport:
    """Over `groups` rows of `pairs` ordered pairs, which count as in PairReport; so do `prompts`.

    difference: accuracy of the first model less that of the second; low, high: its 95 % bootstrap interval, the rows
    being drawn for both at once. only_first, only_second: the rows (or prompts, where these are drawn) on which that
    one is better. p_value: McNemar's exact test, two-sided: how probably two equally good models would differ on those
    as unevenly as this. agreement: the share of ordered pairs of which both say the same.
    """

    groups: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float
    agreement: float
    pairs: int
    prompts: int | None

    def __str__(self) -> str:
        return (
            f"difference {self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}] on "
            f"{counted(self.groups, self.prompts, self.pairs)}; "
            f"McNemar: better on {self.only_first} against {self.only_second}, p = {self.p_value:.3g}; "
            f"agreement {self.agreement:.3f}"
        )


def paired_report(
    first: Tensor, second: Tensor, ranks: Sequence[Sequence[int]], seed: int = 0, units: Units | None = None
) -> PairedReport:
    """Of scores [P, K] of two models on the same groups, as `pair_report` takes them; not all groups may tie."""
    one, other = score_gaps(first, ranks), score_gaps(second, ranks)
    units = (units or Units.alone(len(ranks))).at(one.group)
    lead = credit(one.gap) - credit(other.gap)
    low, high = units.interval(lead, seed)
    leads = np.round(units.sums(lead), 12)  # equal ones are equal, in whatever order they were added
    only = int((leads > 0).sum()), int((leads < 0).sum())
    return PairedReport(
        groups=units.rows,
        difference=units.mean(lead),
        low=low,
        high=high,
        only_first=only[0],
        only_second=only[1],
        p_value=mcnemar(*only),
        agreement=units.mean(np.sign(one.gap) == np.sign(other.gap)),
        pairs=len(lead),
        prompts=units.prompts,
    )


def mcnemar(first: int, second: int) -> float:
    """The exact two-sided p-value of `first` against `second` discordant pairs, each a fair coin's under the null."""
    n = first + second
    binomials = itertools.accumulate(range(min(first, second)), lambda term, i: term * (n - i) // (i + 1), initial=1)
    return min(1.0, 2 * sum(binomials) / 2**n)  # whole numbers to the end: n may be thousands


def disagreements(first: Tensor, second: Tensor, ranks: Sequence[Sequence[int]]) -> list[int]:
    """The groups, of P, on which one model is better, those first on which their probabilities differ most."""
    one, other = score_gaps(first, ranks), score_gaps(second, ranks)
    lead = np.bincount(one.group, credit(one.gap) - credit(other.gap))
    apart = np.bincount(one.group, sigmoid(one.gap) - sigmoid(other.gap)) / np.bincount(one.group).clip(1)
    return sorted(np.flatnonzero(lead).tolist(), key=lambda i: -abs(apart[i]))
