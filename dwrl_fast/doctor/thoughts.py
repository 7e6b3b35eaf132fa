"""Checks of the model's output on a few rows: thoughts, labels, and whether they come from the trained distribution."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dwrl_fast.batching.batch import Batch
from dwrl_fast.doctor.finding import Finding, status_of
from dwrl_fast.doctor.setup import NATS_FAIL, NATS_WARN, Computed, Setup, said
from dwrl_fast.encode import Group, Request
from dwrl_fast.sampling import RatingSampler
from dwrl_fast.sampling.draws import logprobs_at
from dwrl_fast.training.first_figures import CUT_WARN, MASS_WARN, UNREAD_WARN

MASS_FAIL = 0.05
SPREAD_WARN = 0.01  # nats
UNREAD_FAIL = 0.95
RATIO = 1.1
SIGMAS_WARN, SIGMAS_FAIL = 4.0, 6.0
TOKENS = 100  # fewer tokens say too little about their distribution
ROWS_AT_ONCE = 256  # rows of logits
OTHER_ENGINE = (
    "Make the engine sample from softmax(logits / temperature) alone and give the log-probs of that: no top-k, "
    'top-p, min-p or penalties (vLLM: generation_config="vllm", logprobs_mode="processed_logprobs"). The samplers of '
    "this package do so: use one of them. In bfloat16 a small difference is rounding: --dtype fp32 removes it, "
    "--old_logprobs recompute makes it harmless."
)


def thoughts(setup: Setup, groups: Sequence[Group]) -> Finding:
    """The length of the thoughts, and the share that was cut."""
    found = [thought for group in groups for some in group.thoughts for thought in some]
    limit = setup.config.max_completion_length
    cut = sum(not thought.ended for thought in found) / len(found)
    mean = sum(len(thought.ids) for thought in found) / len(found)
    return Finding(
        "thoughts",
        status_of(cut, CUT_WARN),
        f"{len(found)} thoughts about {len(groups)} rows, {mean:.0f} tokens on average; {cut:.0%} cut at "
        f"--max_completion_length {limit}",
        "Raise --max_completion_length, or ask for shorter thoughts in a template of your own (--template).",
        {"truncated": cut, "tokens": mean, "thoughts": len(found)},
    )


def verdicts(setup: Setup, requests: Sequence[Request], groups: Sequence[Group]) -> Finding:
    """The share of verdicts in text that cannot be read."""
    count = sum(len(group.flat) for group in groups)
    unread = setup.method.reward(requests, list(groups))[1] / count
    return Finding(
        "verdicts",
        status_of(unread, UNREAD_WARN, math.inf if setup.config.model_config else UNREAD_FAIL),
        f"{unread:.0%} of {count} cannot be read",
        "Take an instruction-tuned model, raise --max_completion_length, or describe the form more clearly in a "
        "template (--template).",
        {"unread": unread},
    )


def spread(groups: Sequence[Group], computed: Sequence[Computed]) -> Finding:
    """The spread of the scores of thoughts about one response, which is the training signal of the thoughts."""
    found = []
    for group, one in zip(groups, computed, strict=True):
        found += [some.std() for some in one.scores.split([len(each) for each in group.sequences]) if len(some) > 1]
    mean = torch.stack(found).mean().item()
    scores = torch.cat([one.scores for one in computed])
    return Finding(
        "spread of scores",
        "pass" if mean >= SPREAD_WARN else "warn",
        f"scores of thoughts about one response have a standard deviation of {mean:.3g} nats on average; all scores "
        f"have mean {scores.mean():.3g} and deviation {scores.std():.3g}",
        "Thoughts whose scores agree teach nothing: raise --temperature or --max_completion_length, or use a "
        "template (--template) in which the label depends on the thought.",
        {"spread": mean, "mean": scores.mean().item(), "deviation": scores.std().item()},
    )


def label_mass(setup: Setup, groups: Sequence[Group]) -> Finding:
    """p(Yes) + p(No) where the label is read, and the most likely tokens there."""
    model, dialog = setup.runtime.model, setup.method.dialog

    def read(batch: Batch) -> list[tuple[list[float], list[float]]]:
        head = model(batch, tokens=False)
        _, mass = head.scores_and_mass(dialog.label_ids, "vocab")
        likely = head.logits(head.score).softmax(-1)
        every = zip(batch.by_sequence(mass.tolist()), batch.by_sequence(likely.cpu().unbind()), strict=True)
        return [(_joined(some), torch.stack(_joined(each)).sum(0).tolist()) for some, each in every]

    found = setup.runtime.run_batches(groups, read)
    masses = [value for some, _ in found for value in some]
    mean = sum(masses) / len(masses)
    top = (torch.tensor([each for _, each in found]).sum(0) / len(masses)).topk(3)
    names = ", ".join(
        f"{dialog.tokenizer.decode([token], clean_up_tokenization_spaces=False)!r} {p:.2g}"
        for p, token in zip(*(each.tolist() for each in top), strict=True)
    )
    first, second = dialog.template.labels
    return Finding(
        "label mass",
        status_of(1 - mean, 1 - MASS_WARN, math.inf if setup.config.model_config else 1 - MASS_FAIL),
        f"{first!r} and {second!r} together have probability {mean:.3g} where the label is read; the most likely "
        f"tokens are {names}",
        "Change the template so that the model answers with a label, or use labels that it does answer with "
        "(--template). A model without instruction tuning must be tuned first.",
        {"mass": mean, "least": min(masses)},
    )


def sampler_and_trainer(setup: Setup, groups: Sequence[Group], computed: Sequence[Computed]) -> Iterator[Finding]:
    """Compare the sampler's log-probs with those of the training forward pass; then check whether the tokens were drawn
    from that distribution.
    """
    fresh = torch.cat([one.logprobs for one in computed])
    gap = (said(groups) - fresh).abs()
    mean, past = gap.mean().item(), (gap > math.log(RATIO)).float().mean().item()
    figures = {"mean": mean, "most": gap.max().item(), "past": past, "tokens": len(gap)}
    text = (
        f"log-probs of {len(gap)} tokens differ by {mean:.2g} nats on average, {gap.max():.2g} at most; the ratio of "
    )
    text += f"{past:.2%} is past {RATIO}"
    rated = [thought.score for group in groups for some in group.thoughts for thought in some]
    if any(score is not None for score in rated):
        apart = (torch.tensor([math.nan if score is None else score for score in rated]) - _scores(computed)).abs()
        mean = max(mean, apart.mean().item())
        figures |= {"scores mean": apart.mean().item(), "scores most": apart.max().item()}
        text += f"; scores by {apart.mean():.2g} nats, {apart.max():.2g} at most"
    yield Finding("sampler and trainer", status_of(mean, NATS_WARN, NATS_FAIL), text, OTHER_ENGINE, figures)
    if setup.method.sampling_temperature and len(gap) >= TOKENS:
        yield _draws(setup, groups)


def _draws(setup: Setup, groups: Sequence[Group]) -> Finding:
    """For tokens drawn from p, the mean of log p is minus the entropy. Tokens from a distribution restricted to its
    most likely tokens have a higher mean, whatever log-probs the sampler reports.
    """
    runtime = setup.runtime

    def read(batch: Batch) -> list[Tensor]:
        head = runtime.model(batch, tokens=True)
        found = []
        for states, targets in zip(head.token.split(ROWS_AT_ONCE), batch.targets.split(ROWS_AT_ONCE), strict=True):
            logp = logprobs_at(head.logits(states), setup.temperature).clamp_min(-1e4)  # p log p is 0 for p = 0
            p = logp.exp()
            mean = (p * logp).sum(-1)
            drawn = logp.gather(-1, targets[:, None]).squeeze(-1)
            found.append(torch.stack([drawn - mean, (p * logp.square()).sum(-1) - mean.square()], -1))
        sizes = [sum(len(one.ids[one.thought]) for one in group.flat) for group in batch.groups]
        return [some.double().sum(0).cpu() for some in torch.cat(found).split(sizes)]

    surplus, variance = torch.stack(runtime.run_batches(groups, read)).sum(0).tolist()
    sigmas = surplus / math.sqrt(max(variance, 1e-9))
    tokens = sum(len(one.ids[one.thought]) for group in groups for one in group.flat)
    return Finding(
        "draws",
        status_of(abs(sigmas), SIGMAS_WARN, SIGMAS_FAIL),
        f"the sampled tokens are more likely than draws from the trainer's distribution: by {surplus / tokens:.3g} "
        f"nats each, {sigmas:.1f} standard errors",
        OTHER_ENGINE,
        {"surplus": surplus / tokens, "standard errors": sigmas},
    )


def rates(setup: Setup) -> bool:
    """Whether the sampler gives scores with its thoughts."""
    return setup.reads_labels and isinstance(setup.sampler, RatingSampler)


def _scores(computed: Sequence[Computed]) -> Tensor:
    return torch.cat([one.scores for one in computed])


def _joined(nested: Sequence[Sequence[object]]) -> list:
    return [value for some in nested for value in some]
