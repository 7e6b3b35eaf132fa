"""From rows to the groups that a step trains: requests, sampled thoughts, rewards, selection, and the old policy's
log-probs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dwrl_fast.data import Preference
from dwrl_fast.encode import Group, Request
from dwrl_fast.errors import ConfigError
from dwrl_fast.log import logger
from dwrl_fast.methods import Method
from dwrl_fast.progress import Display
from dwrl_fast.sampling import Limits, Sampler, sample_groups
from dwrl_fast.scoring import Judging, PolicyJudging
from dwrl_fast.scoring.runtime import load_writer

FAR = 0.02  # nats
Timed = Callable[[str], AbstractContextManager[None]]


def _untimed(stage: str) -> AbstractContextManager[None]:
    return nullcontext()


class Rollout:
    """Makes the training groups of `method` with the current model of `judging`.

    Raises ConfigError if the sampler's log-probs are requested but cannot replace the trainer's, and ModelError if
    another model writes the thoughts and cannot be loaded. timed: a context that adds its duration to a stage.
    """

    def __init__(self, method: Method, judging: Judging, timed: Timed = _untimed):
        self.method, self.judging, self.runtime, self.timed = method, judging, judging.runtime, timed
        compute, config = self.runtime.compute, method.config
        if method.thinks and config.old_logprobs == "sampler" and not compute.float32:
            raise ConfigError(
                "--old_logprobs sampler needs a sampler that computes in float32, and this one computes in "
                f"{compute.dtype}: its rounding would look like a change of the policy. Use recompute, or --dtype "
                "fp32."
            )
        self.sampler: Sampler | None = self.runtime.sampler
        self.restarts = 0  # of vLLM so far
        if method.writer is not None:
            limits = Limits(config.generation_batch_size, config.generation_cache_gib)
            ranks = self.runtime.ranks
            layout = self.runtime.layout
            self.sampler, _ = load_writer(method.writer, method.question, compute, layout, limits, ranks)

    def __call__(self, rows: Sequence[Preference], seed: int, display: Display) -> tuple[list[Group], dict[str, float]]:
        """The groups of one rollout batch, and figures for the log."""
        method = self.method
        if not method.thoughts_each:
            with display.stage("  " + method.preparation, len(rows)) as stage:
                groups = method.groups(rows, seed)
                groups, figures = self._with_old_logprobs(groups)
                stage.advance(len(rows))
            return groups, figures
        requests = method.requests(rows, seed)
        assert self.sampler is not None
        with display.stage("  " + method.preparation, sum(len(each.contexts) for each in requests)) as stage:
            if self.sampler is self.runtime.sampler:
                with self.timed("sync"):
                    self.runtime.refresh()
            with self.timed("sampling"):
                sampled = sampled_groups(method, requests, self.sampler, seed, stage.advance)
        sampled, unread = method.reward(requests, sampled)
        kept, gaps = self._with_old_logprobs(method.keep(sampled, seed))
        return kept, method.figures(rows, requests, sampled, kept, unread) | gaps | self._restarts()

    def _restarts(self) -> dict[str, float]:
        """How often vLLM was started again since the last rollout batch, on all ranks."""
        if self.runtime.vllm is None:
            return {}
        before, self.restarts = self.restarts, sum(self.runtime.ranks.gather(self.runtime.vllm.engine.restarts))
        return {"engine_restarts": self.restarts - before}

    def _with_old_logprobs(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        method, source = self.method, self.method.config.old_logprobs
        if method.old_policy is None or not groups:
            return groups, {}
        if method.old_policy == "start":
            assert isinstance(self.judging, PolicyJudging)
            with self.timed("old_logprobs"):
                return self.judging.with_start_logprobs(groups), {}
        if method.old_policy == "sampler":
            assert self.sampler is not None
            if source == "recompute" or (source == "auto" and not self.sampler.float32):
                return self.recomputed(groups)
            return groups, {}
        return self.recomputed(groups)[0], {}

    def recomputed(self, groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
        """The groups with the trainer's log-probs instead of the sampler's, computed before any update; and the
        difference of the two in nats.
        """
        with self.timed("old_logprobs"):
            fresh = self.runtime.logprobs(groups, self.method.trained_temperature)
        found = [group.with_logprobs(each) for group, each in zip(groups, fresh, strict=True)]
        gap = (_logprobs(found) - _logprobs(groups)).abs()
        if gap.numel() and gap.mean() > FAR:
            logger.warning(
                "The log-probs of sampler and trainer differ by %.3f nats on average, which is more than rounding. "
                "The trainer's log-probs are used, but the thoughts still come from a policy other than the trained "
                "one.",
                gap.mean().item(),
            )
        return found, {"sampler_gap_mean": gap.mean().item(), "sampler_gap_max": gap.max().item()}


def _logprobs(groups: Sequence[Group]) -> Tensor:
    return torch.tensor([p for group in groups for some in group.thoughts for one in some for p in one.logprobs])


def sampled_groups(
    method: Method,
    requests: Sequence[Request],
    sampler: Sampler,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Group]:
    """One group per request, with the method's number of thoughts per context. `progress` counts contexts."""
    return sample_groups(
        requests,
        method.question,
        sampler,
        method.thoughts_each,
        max_tokens=method.config.max_completion_length,
        temperature=method.sampling_temperature,
        seed=seed,
        progress=progress,
    )
