"""`dwrl_fast.Scorer`: a model as a judge, for evaluation and for other code, such as the loop of another trainer."""

import asyncio
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor

from dwrl_fast.batching.layout import Layout, Packing
from dwrl_fast.compute import Compute
from dwrl_fast.config import EvaluateConfig
from dwrl_fast.data import Preference
from dwrl_fast.data.given import Prompt, Response, Turns, as_list, as_prompt, as_responses
from dwrl_fast.dialog import Dialog, Thinking
from dwrl_fast.errors import DataError, ModelError, NotFiniteError
from dwrl_fast.log import warn_once
from dwrl_fast.models.hub import judge_folder
from dwrl_fast.models.model import SHORTEN, check_positions, positions
from dwrl_fast.options import given_by
from dwrl_fast.sampling import Limits
from dwrl_fast.scoring.judging import Judging, Progress
from dwrl_fast.scoring.kinds import judging_of
from dwrl_fast.scoring.loading import load_judge, load_trained
from dwrl_fast.scoring.reward import Rewards
from dwrl_fast.scoring.runtime import load_runtime
from dwrl_fast.scoring.scored import ScoredGroup, marginal_scores
from dwrl_fast.scoring.yes_no import GenerativeJudging

Thoughts = list[list[str]]


class Scorer:
    """Scores responses; `dwrl_fast.evaluate` uses it too. Prompts are strings or lists of messages, responses are
    strings or lists with one message. The content of a message may be a list of text parts. If a prompt ends with an
    assistant turn, each response continues that turn.

    Scores are float32 on the CPU, in the given order: log p(Yes) in nats, the reward of scalar heads, the number at the
    end of a thought, or the log-prob or implicit reward of policies. With `votes` = 1 the thought is greedy. With more
    votes, thoughts are drawn with `seed`, and the score is the log of the mean of their p(Yes). Methods that compare
    two responses give log-odds in nats and need `reference`, a text to compare each response with. For all other
    methods log-odds are the difference of two scores. If a verdict cannot be read, the score is nan.

    The responses to one prompt share it in the forward pass, so it is best to put many of them into one call. The score
    of a text, and the random draws of its thoughts, do not depend on the other texts in the call. Calls from several
    threads run in parallel, each with its own memory; calls of a policy with adapters wait for each other.

    thinks: whether a thought precedes the verdict, so that votes have an effect. kind: the kind of a verdict; compares:
    whether a verdict is about two responses. dialog: the builder of the model's sequences. tokens: `computed` so far,
    and `naive` (one sequence at a time without sharing); padding in the sampler is not counted. unjudged: the number of
    rows without a reward from `as_reward_function`, by reason.

    Raises DataError if prompts or responses are not such lists, or a prompt is not a conversation, and TemplateError if
    the chat template cannot represent one.
    """

    def __init__(self, judging: Judging):
        card = judging.card
        self.method: str = card["method"]
        self.thinks, self.kind, self.dialog = judging.thinks, judging.kind, judging.dialog
        self.compares = judging.kind == "comparison"
        self.tokens: Counter[str] = judging.runtime.layout.tokens
        self.unjudged: Counter[str] = Counter()
        self._said_past = False  # whether the warning about the model's positions was logged
        self._judging, self._lock = judging, threading.Lock()
        self._writes = judging.thinks or "prefilled_by" in card
        self._thought_tokens: int = card.get("max_completion_length", 0) if self._writes else 0
        self._calibration: dict[str, Any] = card.get("calibration", {"temperature": 1.0})

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        method: str | None = None,
        template: str | None = None,
        enable_thinking: Thinking = "auto",
        aspect: str | None = None,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        packing: Packing = "tree",
        token_budget: int = 16384,
        generation_batch_size: int = 256,
        generation_cache_gib: float = 4.0,
        max_completion_length: int | None = None,
        temperature: float | None = None,
        use_vllm: bool = False,
        vllm_mode: Literal["colocate", "server"] = "colocate",
        vllm_server_base_url: Sequence[str] = EvaluateConfig.vllm_server_base_url,
        vllm_server_timeout: float = EvaluateConfig.vllm_server_timeout,
        vllm_gpu_memory_utilization: float = EvaluateConfig.vllm_gpu_memory_utilization,
        vllm_max_model_length: int | None = None,
    ) -> Self:
        """From a folder that `dwrl_fast.train` wrote (OUTPUT_DIR/model), or the name of such a model on the Hugging
        Face hub, from which only safetensors, JSON and templates are downloaded; or, with method "judge", which asks
        for a verdict in text, any causal language model by folder, hub name or GGUF file. Uses the GPU if there is one.

        revision: branch, tag or commit on the hub. The other options are those of `dwrl_fast.evaluate`; None means the
        value of the model's training. Raises ModelError if the model cannot be loaded or was not trained with this
        package, ConfigError if an option is wrong.
        """
        options: dict[str, Any] = {
            "revision": revision,
            "method": method,
            "template": template,
            "enable_thinking": enable_thinking,
            "aspect": aspect,
            "dtype": dtype,
            "packing": packing,
            "token_budget": token_budget,
            "generation_batch_size": generation_batch_size,
            "generation_cache_gib": generation_cache_gib,
            "max_completion_length": max_completion_length,
            "temperature": temperature,
            "use_vllm": use_vllm,
            "vllm_mode": vllm_mode,
            "vllm_server_base_url": vllm_server_base_url,
            "vllm_server_timeout": vllm_server_timeout,
            "vllm_gpu_memory_utilization": vllm_gpu_memory_utilization,
            "vllm_max_model_length": vllm_max_model_length,
        }
        config = given_by(
            EvaluateConfig, "Scorer.from_pretrained", model_name_or_path=str(path), dataset_name=(), **options
        )
        if method is not None:
            dialog, card = load_judge(
                method, str(path), template=template, aspect=aspect, enable_thinking=enable_thinking
            )
        else:
            path = judge_folder(path, revision)
            dialog, card = load_trained(path, aspect)
        limits = {"max_completion_length": max_completion_length, "temperature": temperature}
        card |= {name: value for name, value in limits.items() if value is not None}
        compute = Compute.resolve(dtype)
        layout = Layout(packing, token_budget, dialog.pad_id, compute.device)
        sampling = Limits(generation_batch_size, generation_cache_gib)
        runtime = load_runtime(
            card, str(path), None, 0, dialog, compute, layout, sampling, frozen=True, vllm=config.vllm
        )
        return cls(judging_of(runtime, card))

    def score_groups(
        self, rows: Sequence[Preference], *, votes: int = 1, seed: int = 0, progress: Progress | None = None
    ) -> list[ScoredGroup]:
        """All results for every response of every row: scores, verdicts, and thoughts as token ids.

        The groups are in the order of `rows`. An unreadable verdict counts as wrong: it counts for the response with
        the worse rank. `progress` counts responses. All other methods of this class, and evaluation, use this one.
        Raises NotFiniteError if the model gives NaN, and ModelError, before anything is scored, if it cannot compute
        sequences as long as these may become.
        """
        if votes < 1:
            raise DataError(f"votes = {votes}: must be at least 1")
        device = self._judging.runtime.model.lm.device  # a new thread would use the first GPU
        alone = self._lock if self._judging.switches_model else nullcontext()
        with alone, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            groups = self._judging.score_groups(rows, votes=votes, seed=seed, progress=progress)
        if self._writes:
            self._judging.runtime.layout.count(*_sampled_tokens(groups))
        self.check_positions(max((self._without_thought(group) for group in groups), default=0))
        for found in groups:
            if any(math.isnan(score) for scores in found.scores for score in scores):
                raise NotFiniteError(
                    f"{found.group.preference.source}: the model's score is not a number (NaN): its weights hold NaN, "
                    'or its activations overflow. Try dtype "fp32", or an earlier checkpoint'
                )
        return groups

    def check_positions(self, longest: int) -> None:
        """Warn once if a sequence with `longest` tokens before its thought may have more tokens than the model has
        positions. Raises ModelError if the model cannot compute it.
        """
        remedy = SHORTEN + (", or lower max_completion_length" if self._thought_tokens else "")
        longest += self._thought_tokens
        self._said_past = self._said_past or check_positions(self._judging.runtime.model, longest, remedy)

    @overload
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        votes: int = 1,
        return_thoughts: Literal[False] = False,
        *,
        reference: Sequence[Response] | None = None,
        seed: int = 0,
    ) -> Tensor: ...

    @overload
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        votes: int = 1,
        *,
        return_thoughts: Literal[True],
        reference: Sequence[Response] | None = None,
        seed: int = 0,
    ) -> tuple[Tensor, Thoughts]: ...

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        votes: int = 1,
        return_thoughts: bool = False,
        *,
        reference: Sequence[Response] | None = None,
        seed: int = 0,
    ) -> Tensor | tuple[Tensor, Thoughts]:
        """Scores [N] of N responses, each with the prompt at the same index; with `reference`, the log-odds that it is
        better than the reference at the same index.

        With `return_thoughts`, also the thoughts about each response, as text. Raises ModelError if the method writes
        none, or needs a `reference`.
        """
        turns, texts, others = _conversations(prompts, responses, reference)
        if return_thoughts and not self._writes:
            raise ModelError(f"the method {self.method} writes no thoughts: leave return_thoughts out")
        if self.compares:
            if others is None:
                raise ModelError(
                    f"the method {self.method} only compares responses: give reference=, for each response one to "
                    "compare it with, and the scores are log-odds"
                )
            scores, thoughts = self._compared(turns, texts, others, votes, seed)
        elif others is None:
            scores, thoughts = self._each(turns, texts, votes, seed)
        else:
            both, thoughts = self._each([*turns, *turns], [*texts, *others], votes, seed)
            scores, thoughts = both[: len(texts)] - both[len(texts) :], thoughts[: len(texts)]
        return (scores.float(), thoughts) if return_thoughts else scores.float()

    def probability(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        reference: Sequence[Response] | None = None,
        *,
        votes: int = 1,
        seed: int = 0,
    ) -> Tensor:
        """[N]: the probability that each response is better than its `reference`: the sigmoid of their log-odds,
        divided by the temperature that `dwrl_fast.evaluate --calibrate` stored with the model (otherwise 1). Without
        `reference`: p(Yes).
        """
        if reference is not None:
            fitted = self._calibration.get("votes", votes)
            if fitted != votes:
                warn_once(
                    f"the stored temperature was fitted to scores of {fitted} thoughts, but these scores are of "
                    f"{votes}."
                )
            about = self._calibration.get("aspect", self.dialog.aspect)
            if about != self.dialog.aspect:
                warn_once(
                    f"the stored temperature was fitted to scores about {about}, but these scores are about "
                    f"{self.dialog.aspect}."
                )
            scores = self.score(prompts, responses, votes, reference=reference, seed=seed)
            return (scores / self._calibration["temperature"]).sigmoid()
        if not isinstance(self._judging, GenerativeJudging):
            raise ModelError(
                f"the method {self.method} has no p(Yes): give reference=, for each response one to compare it with, "
                "for the probability that it is better"
            )
        return self.score(prompts, responses, votes, seed=seed).exp()

    def compare(self, prompt: Prompt, a: Response, b: Response, *, votes: int = 1, seed: int = 0) -> float:
        """The probability that `a` is the better response; see `probability`."""
        return self.probability([prompt], [a], [b], votes=votes, seed=seed).item()

    def rank(self, prompt: Prompt, responses: Sequence[Response], *, votes: int = 1, seed: int = 0) -> list[int]:
        """The indices of `responses`, best first. Equal responses keep their order; responses without a score come
        last. Methods that compare two responses compare every pair.
        """
        turns, begun = as_prompt("prompt", prompt)
        texts = [begun + text for text in as_responses("responses", responses)]
        if not self.compares:
            scores, _ = self._each([turns] * len(texts), texts, votes, seed)
        elif len(texts) == 1:
            return [0]
        else:
            (group,) = self.score_groups([_equals(turns, texts, "prompt")], votes=votes, seed=seed)
            scores = marginal_scores([group])[0]
        found = scores.tolist()
        return sorted(range(len(texts)), key=lambda i: math.inf if math.isnan(found[i]) else -found[i])

    def as_reward_function(
        self, *, votes: int = 1, probability: bool = False, reference: str = "reference"
    ) -> Callable[..., Coroutine[Any, Any, list[float | None]]]:
        """A reward function for TRL's trainers. It gives the score, or with `probability` the probability.

        reference: the column of the training data with the references, for methods that compare. A row that cannot be
        judged gets None, which TRL treats as no reward, and is counted in `unjudged`; the first one is logged. Such
        rows have tool turns, an image or no completion, have more tokens than the model has positions, cannot be
        represented by the chat template, or get an unreadable verdict. Raises DataError if the lists differ in length
        or the column is missing, ModelError if log-odds would usually be infinite.
        """
        scored = partial(self.probability if probability else self.score, votes=votes)
        most = positions(self._judging.runtime.model) or sys.maxsize
        rewards = Rewards(scored, self.dialog, most - self._thought_tokens, self.unjudged)

        async def preference_reward(
            prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
        ) -> list[float | None]:
            others = columns.get(reference) if self.compares else None
            if self.compares and others is None:
                raise DataError(
                    f"the training data have no column {reference!r}, which the method {self.method} compares each "
                    "completion with; name it in as_reward_function(reference=...)"
                )
            if self.compares and self.thinks and not probability:
                raise ModelError(
                    f"the method {self.method} gives log-odds of verdicts in text, infinite log-odds where all agree, "
                    "which cannot be a reward: use as_reward_function(probability=True)"
                )
            return await asyncio.to_thread(rewards, prompts, completions, others)

        return preference_reward

    def _each(self, turns: Sequence[Turns], texts: Sequence[str], votes: int, seed: int) -> tuple[Tensor, Thoughts]:
        """Scores [N] under a method that judges each response alone."""
        places = self._together(turns, texts, votes)
        rows = [_equals(turns[some[0]], [texts[i] for i in some], f"prompts[{some[0]}]") for some in places]
        groups = self.score_groups(rows, votes=votes, seed=seed)
        scores = torch.zeros(len(texts), dtype=torch.float64)
        thoughts: Thoughts = [[] for _ in texts]
        for some, group in zip(places, groups, strict=True):
            scores[some] = marginal_scores([group])[0]
            for i, written in zip(some, self._thoughts(group), strict=False):
                thoughts[i] = written
        # An unreadable number is -inf there, because no response is known to be better.
        return scores.masked_fill(scores == -math.inf, math.nan), thoughts

    def _compared(
        self, turns: Sequence[Turns], texts: Sequence[str], others: Sequence[str], votes: int, seed: int
    ) -> tuple[Tensor, Thoughts]:
        """Log-odds [N] under a method that compares, and the thoughts of both orders. In the first order the response
        is shown first.
        """
        rows = [_equals(turns[i], pair, f"prompts[{i}]") for i, pair in enumerate(zip(texts, others, strict=True))]
        groups = self.score_groups(rows, votes=votes, seed=seed)
        scores = marginal_scores(groups)
        return scores[:, 0] - scores[:, 1], [list(chain(*self._thoughts(group))) for group in groups]

    def _without_thought(self, found: ScoredGroup) -> int:
        """The tokens of the longest sequence, without the thought."""
        return max(len(s.ids) - (s.thought.stop - s.thought.start if self._writes else 0) for s in found.group.flat)

    def _thoughts(self, found: ScoredGroup) -> Thoughts:
        decode = self.dialog.tokenizer.decode
        if not self._writes:
            return []
        return [
            [decode(sequence.ids[sequence.thought], skip_special_tokens=True) for sequence in sequences]
            for sequences in found.group.sequences
        ]

    def _together(self, turns: Sequence[Turns], texts: Sequence[str], votes: int) -> list[list[int]]:
        """Indices of responses to the same prompt, grouped so that each group fits into a forward pass even with the
        longest thoughts.
        """
        dialog = self.dialog
        budget = self._judging.runtime.layout.token_budget
        found: dict[Any, list[list[int]]] = {}
        left: dict[Any, int] = {}
        for i, (prompt, text) in enumerate(zip(turns, texts, strict=True)):
            key = tuple((turn["role"], turn["content"]) for turn in prompt)
            size = before = budget
            if isinstance(dialog, Dialog):
                sequence = dialog.sequence(dialog.context(prompt, text), [])
                before = sequence.prompt.stop
                size = (len(sequence.ids) - before) + (votes if self.thinks else 1) * self._thought_tokens
            if key not in found or size > left[key]:
                found.setdefault(key, []).append([])
                left[key] = budget - before
            found[key][-1].append(i)
            left[key] -= size
        return [some for parts in found.values() for some in parts]


def _conversations(
    prompts: Sequence[Prompt], responses: Sequence[Response], reference: Sequence[Response] | None
) -> tuple[list[Turns], list[str], list[str] | None]:
    """Prompts, responses and references. A response that its prompt began is completed with that beginning."""
    prompts, texts = as_list("prompts", prompts), as_responses("responses", responses)
    if len(prompts) != len(texts):
        raise DataError(f"{len(prompts)} prompts and {len(texts)} responses: give each response its prompt")
    others = None if reference is None else as_responses("reference", reference, len(texts))
    read = [as_prompt(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]

    def whole(answers: list[str]) -> list[str]:
        return [begun + answer for (_, begun), answer in zip(read, answers, strict=True)]

    return [turns for turns, _ in read], whole(texts), None if others is None else whole(others)


def _equals(prompt: Turns, texts: Sequence[str], source: str) -> Preference:
    """A row without preference between its responses: an unreadable verdict then counts for none of them."""
    return Preference(prompt, tuple(texts), ranks=(1,) * len(texts), source=source)


def _sampled_tokens(groups: Sequence[ScoredGroup]) -> tuple[int, int]:
    """The tokens of sampling, computed and naive. A context is computed once for all its thoughts, naively once per
    thought. If scores came with the thoughts, the rating turns were appended; naively the whole sequence is computed
    again for a score.
    """
    computed = naive = 0
    rated = any(one.score is not None for found in groups for some in found.group.thoughts for one in some)
    for sequences in (sequences for found in groups for sequences in found.group.sequences):
        context = sequences[0].thought.start
        written = sum(one.thought.stop - one.thought.start for one in sequences)
        computed += context + written
        naive += len(sequences) * context + written
        if rated:
            computed += sum(len(one.ids) - one.thought.stop for one in sequences)
            naive += sum(len(one.ids) for one in sequences)
    return computed, naive
