"""`star-sft`: the thoughts that end with the right verdict are imitated (docs/methods.md)."""

from collections.abc import Sequence

from torch import Tensor

from dwrl_fast.batching.batch import Batch, Size
from dwrl_fast.data import Preference
from dwrl_fast.encode import Group
from dwrl_fast.methods.method import Tally
from dwrl_fast.methods.star import SelfTaught, select
from dwrl_fast.scoring import Progress


class StarImitation(SelfTaught):
    name = "star-sft"

    def rollout(
        self, rows: Sequence[Preference], seed: int, progress: Progress
    ) -> tuple[list[Group], dict[str, float]]:
        asked = self.ask(rows, seed)
        sampled = self.sample_verdicts(asked, seed, progress)
        kept = [one for group in sampled for one in select(group, self.judged(group, right=True))]
        return kept, self.figures(rows, asked, sampled, kept)

    def loss(self, phase: str, batch: Batch, minibatch: Size, tally: Tally) -> Tensor:
        """-log pi(o_t | .), the mean over the tokens of the minibatch."""
        losses = -self.token_logprobs(self.model(batch, tokens=True), batch)
        tally.add("loss", losses)
        return losses.sum() / minibatch.tokens
