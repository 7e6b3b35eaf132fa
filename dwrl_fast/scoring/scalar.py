"""The reward of a scalar model, read at the last token of prompt and response, or of a thought about them."""

from collections.abc import Sequence

from dwrl_fast.data import Preference
from dwrl_fast.encode import plain_groups, response_requests
from dwrl_fast.scoring.judging import Judging, Progress
from dwrl_fast.scoring.scored import ScoredGroup


class ScalarJudging(Judging):
    """r(x, y), or r(x, y, o) with one cached thought o per response. Votes have no effect."""

    kind = "score"

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[ScoredGroup]:
        if self.runtime.sampler is None:
            groups = plain_groups(rows, self.dialog)
        else:
            groups = self.sample(response_requests(rows, self.dialog), 1, seed, progress)
            progress = None  # writing the thoughts took the time and was counted
        scores = self.runtime.run_batches(
            groups, lambda batch: batch.by_sequence(self.runtime.model(batch).tolist()), progress
        )
        return [*map(ScoredGroup, groups, scores)]
