"""log p(Yes) after a thought: the score of a generative preference model."""

from collections.abc import Sequence

from dwrl_fast.batching.batch import Batch
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, response_requests
from dwrl_fast.scoring.judging import Judging, Progress
from dwrl_fast.scoring.scored import ScoredGroup


class GenerativeJudging(Judging):
    """s = log p(Yes | x, y, o) after one greedy thought, or after each of `votes` sampled ones."""

    thinks = True
    kind = "score"

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[ScoredGroup]:
        normalization = self.card["score_normalization"]
        groups = self.sample(response_requests(rows, self.dialog), votes, seed, progress, normalization)
        scores = _from_cache(groups) or self.runtime.run_batches(groups, self._scores)
        return [*map(ScoredGroup, groups, scores)]

    def _scores(self, batch: Batch) -> list[list[list[float]]]:
        head = self.runtime.model(batch, tokens=False)
        return batch.by_sequence(head.scores(self.dialog.label_ids, self.card["score_normalization"]).tolist())


def _from_cache(groups: Sequence[Group]) -> list[list[list[float]]]:
    """The scores that came with the thoughts; empty if the sampler gave none."""
    given = [[[thought.score for thought in some] for some in group.thoughts] for group in groups]
    found = [[[score for score in some if score is not None] for some in each] for each in given]
    return found if found == given else []
