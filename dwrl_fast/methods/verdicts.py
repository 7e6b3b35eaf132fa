"""What the methods share that judge two responses in a thought which ends with the verdict."""

from collections.abc import Sequence
from typing import Any

from dwrl_fast.compute import step_seed
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Context, SingleTurn
from dwrl_fast.encode import Comparison, Group, comparison_contexts, drawn_orders
from dwrl_fast.methods.generative import GenerativeMethod
from dwrl_fast.objectives.group_relative import choice_rewards
from dwrl_fast.sampling import Sampler, sample_groups
from dwrl_fast.scoring import ChoiceScorer, Progress, Runtime, Scorer, read_choices

Asked = list[tuple[Preference, list[Comparison]]]


class PairwiseVerdicts(GenerativeMethod):
    template = "pairwise"

    @classmethod
    def make_scorer(cls, runtime: Runtime, card: dict[str, Any]) -> Scorer:
        return ChoiceScorer(runtime, card["temperature"], card["max_completion_length"])

    def ask(self, rows: Sequence[Preference], seed: int) -> Asked:
        """Every two responses that do not tie, in an order drawn from `seed`; rows without any are left out."""
        drawn = drawn_orders(rows, step_seed(seed, "order", 0))
        return [(row, some) for row, some in zip(rows, drawn, strict=True) if some]

    def contexts(self, asked: Asked) -> list[list[Context]]:
        return comparison_contexts([row for row, _ in asked], [some for _, some in asked], self.dialog)

    def sample_verdicts(self, asked: Asked, seed: int, progress: Progress) -> list[Group]:
        """One group a row, with the thoughts about each of its comparisons; their rewards are 1 where the verdict is
        right.
        """
        return self.written(asked, self.contexts(asked), self.dialog, self.sampler, seed, progress)

    def written(
        self,
        asked: Asked,
        contexts: list[list[Context]],
        dialog: SingleTurn,
        sampler: Sampler,
        seed: int,
        progress: Progress,
    ) -> list[Group]:
        """The same for contexts of `dialog`, the thoughts being sampled by `sampler`."""
        groups = sample_groups(
            [row for row, _ in asked],
            contexts,
            dialog,
            sampler,
            self.config.num_generations,
            max_tokens=self.config.max_completion_length,
            temperature=self.config.temperature,
            seed=seed,
            progress=in_responses(progress, asked),
        )
        for group, (_, comparisons) in zip(groups, asked, strict=True):
            for comparison, choices in zip(comparisons, read_choices(group, dialog), strict=True):
                assert comparison.right is not None
                group.unparsable += choices.count(None)
                group.rewards.append(choice_rewards(choices, comparison.right))
        return groups


def in_responses(progress: Progress, asked: Asked) -> Progress:
    """`progress`, which counts responses, for a sampler that counts comparisons."""
    comparisons = sum(len(some) for _, some in asked)
    responses = sum(len(row.responses) for row, _ in asked)
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        progress(responses * done // comparisons - responses * before // comparisons)

    return advance
