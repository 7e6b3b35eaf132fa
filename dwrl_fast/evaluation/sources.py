"""Accuracy by source, if the groups come from several."""

import dataclasses
from collections.abc import Mapping, Sequence

from dwrl_fast.data import Preference
from dwrl_fast.data.mixture import short_names
from dwrl_fast.data.preference import LINES
from dwrl_fast.evaluation.calibration import calibration
from dwrl_fast.evaluation.pairs import PairReport, full_report, score_gaps
from dwrl_fast.evaluation.units import Units
from dwrl_fast.log import warn_once
from dwrl_fast.objectives.agreement import order_accuracy, rank_grid
from dwrl_fast.scoring import ScoredGroup, marginal_scores


def source_of(row: Preference) -> str:
    """The file or data set of a row, as the user named it."""
    return LINES.sub("", row.source)


def source_accuracy(groups: Sequence[ScoredGroup], names: Mapping[str, str]) -> dict[str, float]:
    """Mean accuracy of the scores in `groups`, by source. names: source -> short name.

    A batch that was sampled before the files of a resumed run were renamed may have sources without a name here. They
    count under their own short names. A source is left out if it has no group here, or no group with an ordered pair.
    Groups without a score for each response (of methods that only compare responses) are left out too.
    """
    accuracies = {}
    scored = [found for found in groups if len(found.scores) == len(found.group.preference.responses)]
    sources = dict.fromkeys(source_of(found.group.preference) for found in scored)
    others = short_names([source for source in sources if source not in names])
    for name, part in _parts(scored, {**names, **others}).items():
        credit = order_accuracy(marginal_scores(part), rank_grid([each.group.ranks for each in part]))
        if len(credit):
            accuracies[name] = credit.mean().item()
    return accuracies


def source_reports(groups: Sequence[ScoredGroup], seed: int) -> dict[str, PairReport]:
    """Reports on `groups` with their scores: over all under the key "", and, if there are several sources, over each
    under its short name.

    Raises DataError like `pair_report`. A single source for which that would be raised is left out with a warning.
    """
    found = {"": _report(groups, seed)}
    sources = dict.fromkeys(source_of(each.group.preference) for each in groups)
    for name, part in _parts(groups, short_names(list(sources))).items() if len(sources) > 1 else ():
        if any(len(set(each.group.ranks)) > 1 for each in part):
            found[name] = _report(part, seed)
        else:
            warn_once(f"{name} has no accuracy of its own: the responses of each of its rows all tie.")
    return found


def _parts(groups: Sequence[ScoredGroup], names: Mapping[str, str]) -> dict[str, list[ScoredGroup]]:
    found: dict[str, list[ScoredGroup]] = {name: [] for name in names.values()}
    for each in groups:
        found[names[source_of(each.group.preference)]].append(each)
    return {name: part for name, part in found.items() if part}


def _report(groups: Sequence[ScoredGroup], seed: int) -> PairReport:
    a_token = [dataclasses.replace(each, scores=[[score] for score in each.token_scores]) for each in groups]
    scores, ranks = marginal_scores(groups), [each.group.ranks for each in groups]
    units = Units.of([each.group.preference for each in groups])
    report = full_report(
        scores,
        ranks,
        seed,
        units,
        unparsable=sum(each.unparsable for each in groups),
        first_shares=[share for each in groups for share in each.first_shares],
        token_scores=marginal_scores(a_token) if groups[0].token_scores else None,
    )
    gaps = score_gaps(scores, ranks)
    return dataclasses.replace(report, calibration_error=calibration(gaps.gap, units.at(gaps.group).weight).error)
