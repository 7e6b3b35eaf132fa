"""Comparison of two models on the same preferences: the difference and its uncertainty."""

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
    """The comparison over `groups` rows with `pairs` ordered pairs; these fields and `prompts` are as in PairReport.

    difference: accuracy of the first model minus that of the second. low, high: its 95 % bootstrap interval; the same
    rows are drawn for both models. only_first, only_second: the number of rows (or prompts, if prompts are drawn) on
    which only that model is better. p_value: of McNemar's exact two-sided test: the probability that two equally good
    models differ at least this unevenly on those rows. agreement: the share of ordered pairs on which both models
    agree.
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
    """first, second: scores [P, K] of the two models on the same groups, in the form that `pair_report` takes. At least
    one group must not be a tie.
    """
    one, other = score_gaps(first, ranks), score_gaps(second, ranks)
    units = (units or Units.alone(len(ranks))).at(one.group)
    lead = credit(one.gap) - credit(other.gap)
    low, high = units.interval(lead, seed)
    leads = np.round(units.sums(lead), 12)  # so that the order of summation does not matter
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
    """The exact two-sided p-value for `first` against `second` discordant pairs. Under the null hypothesis each is a
    fair coin toss.
    """
    n = first + second
    binomials = itertools.accumulate(range(min(first, second)), lambda term, i: term * (n - i) // (i + 1), initial=1)
    return min(1.0, 2 * sum(binomials) / 2**n)  # integers until the division, because n may be thousands


def disagreements(first: Tensor, second: Tensor, ranks: Sequence[Sequence[int]]) -> list[int]:
    """The indices of groups on which one model is better, ordered by the difference of their probabilities, largest
    first.
    """
    one, other = score_gaps(first, ranks), score_gaps(second, ranks)
    lead = np.bincount(one.group, credit(one.gap) - credit(other.gap))
    apart = np.bincount(one.group, sigmoid(one.gap) - sigmoid(other.gap)) / np.bincount(one.group).clip(1)
    return sorted(np.flatnonzero(lead).tolist(), key=lambda i: -abs(apart[i]))
