"""`star-dpo`: of the thoughts about one comparison a right one is preferred to a wrong one, by DPO with the model that
sampled them as reference (docs/methods.md).
"""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group
from dwrl_fast.methods.method import Tally
from dwrl_fast.methods.star import Places, SelfTaught, select
from dwrl_fast.objectives.direct_preference import implicit_reward
from dwrl_fast.scoring import Progress

BETA = 0.1


class StarContrast(SelfTaught):
    name = "star-dpo"

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        asked = self.ask(rows, seed)
        sampled = self.sample_verdicts(asked, seed, progress)
        rng = np.random.default_rng(step_seed(seed, "contrast", 0))
        right, wrong = ([self.judged(group, right=each) for group in sampled] for each in (True, False))
        drawn = [_draw(*places, rng) for places in zip(right, wrong, strict=True)]
        kept = [one for group, places in zip(sampled, drawn, strict=True) for one in select(group, places)]
        if kept:
            self.recompute_old_logprobs(kept)  # the reference's, at temperature 1
        logs = self.figures(rows, asked, sampled, kept)
        logs["only_right"] = float(sum(not some for places in wrong for some in places))
        logs["only_wrong"] = float(sum(not some for places in right for some in places))
        return kept, logs

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        """-log sigmoid(beta (log-ratio of the right thought - that of the wrong one)), the mean over comparisons."""
        assert batch.old_logprob is not None
        logprob = self.token_logprobs(self.model(batch, tokens=True), batch)
        beta = BETA if self.config.beta is None else self.config.beta
        rewards = implicit_reward(logprob, batch.old_logprob, batch.lengths, beta)
        lead = rewards[::2] - rewards[1::2]
        losses = -F.logsigmoid(lead)
        tally.add("loss", losses)
        tally.add("reward_right", rewards[::2])
        tally.add("reward_wrong", rewards[1::2])
        tally.add("reward_accuracy", (lead > 0).double() + 0.5 * (lead == 0))
        return losses.sum() / (minibatch.sequences / 2)


def _draw(right: Places, wrong: Places, rng: np.random.Generator) -> Places:
    """For each comparison that has both, one right thought and one wrong one."""
    return [
        [int(rng.choice(good)), int(rng.choice(bad))] if good and bad else []
        for good, bad in zip(right, wrong, strict=True)
    ]
