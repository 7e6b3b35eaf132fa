"""The score is the number at the end of a thought about one response."""

import math
from collections.abc import Sequence

from dwrl_fast.data import Preference
from dwrl_fast.dialog import read_score
from dwrl_fast.encode import read_thoughts, response_requests
from dwrl_fast.scoring.judging import Judging, Progress
from dwrl_fast.scoring.scored import ScoredGroup


class PointJudging(Judging):
    """The number of one greedy thought, or the mean of the numbers of `votes` sampled ones. It is not a
    log-probability.

    A response without any readable number counts as wrong: its score is infinite, with the wrong sign.
    """

    thinks = True
    kind = "number"

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[ScoredGroup]:
        found = []
        for group in self.sample(response_requests(rows, self.dialog), votes, seed, progress):
            best, scores = min(group.ranks), []
            verdicts = read_thoughts(group, self.dialog, read_score)
            for rank, points in zip(group.ranks, verdicts, strict=True):
                read = [number for number in points if number is not None]
                wrong = -math.inf if rank == best else math.inf
                scores.append([sum(read) / len(read) if read else wrong])
            found.append(ScoredGroup(group, scores, verdicts))
        return found
