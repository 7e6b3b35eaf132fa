"""What the tests of methods share that judge two responses in text: templates, a sampler that says what it is told to,
and the log-probs of a sequence by itself.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fakes import FakePolicy
from tiny import tiny_config
from torch import Tensor

from dwrl_fast.batching.batch import Size
from dwrl_fast.compute import Compute
from dwrl_fast.dialog import Sequence as Ids
from dwrl_fast.dialog import SingleTurn
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import Group, Thought
from dwrl_fast.methods import METHODS, Method, StepMetrics
from dwrl_fast.models.pretrained import save_pretrained
from dwrl_fast.templates import Template

PAIRWISE = Template("compare {prompt} A {response_a} B {response_b}", labels=None, kind="pairwise")
DIRECT = Template("compare {prompt} A {response_a} B {response_b}", labels=("A", "B"), kind="direct")
POINTWISE = Template("score {prompt} {response}", labels=None, kind="pointwise")
# The text of a template file, with an aspect.
RUBRIC = """\
kind: pairwise
evaluate: |-
  score {aspect}
  {prompt} A {response_a} B {response_b}
  ok <answer>[[A]]</answer> ok <answer>[[B]]</answer>
"""
TEMPLATES = {"gram": DIRECT, "pairrm": DIRECT, "judge": PAIRWISE, "grpo-point": POINTWISE}
A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"
CUT = " cut"  # at the end of what is said: the limit came before the end of the turn


class Says:
    """A sampler. says(context as text, i) is the i-th thought about it."""

    float32 = True

    def __init__(self, dialog: SingleTurn, says: Callable[[str, int], str]) -> None:
        self.dialog, self.says = dialog, says

    def sample(self, contexts: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[Thought]]:
        asked = [self.dialog.tokenizer.decode(list(ids)) for ids in contexts]
        if options.get("progress") is not None:
            options["progress"](len(asked))
        return [[self._thought(self.says(text, i)) for i in range(n)] for text in asked]

    def _thought(self, text: str) -> Thought:
        ids = self.dialog.tokenizer.encode(text.removesuffix(CUT))
        ids += [] if text.endswith(CUT) else [self.dialog.end_id]
        return Thought(ids, [0.0] * len(ids), not text.endswith(CUT))


def saved_model(folder: Path, name: str) -> Path:
    """A model as `train --method name` would save it after a few steps; `folder` holds the tiny one before them."""
    if name == "dwrl":
        return folder / "tiny"
    if not (folder / name).exists():
        template = TEMPLATES.get(name)
        dialog = SingleTurn(make_tokenizer(), template, "correctness") if template else None
        policy = FakePolicy(tiny_config(folder, method=name, dtype="fp32"), dialog)
        shake(policy)
        save_pretrained(folder / name, policy.model, policy.dialog, policy.method.card())
    return folder / name


def make_method(folder: Path, name: str, template: Template = PAIRWISE, **changes: Any) -> Any:
    dialog = SingleTurn(make_tokenizer(), template, "correctness")
    return METHODS[name](tiny_config(folder, method=name, **changes), dialog, Compute.resolve("fp32"))


def backward(method: Method, groups: list[Group], budget: int = 10**6) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and figures of one minibatch, in micro-batches of whatever fits into `budget`."""
    tally, total = StepMetrics(), 0.0
    object.__setattr__(method.layout, "token_budget", budget)
    batches = method.layout.batches(groups)
    for batch in batches:
        loss = method.loss(method.phases[0], batch, Size.of(batches), tally)
        loss.backward()
        total += loss.item()
    return total, taken_gradient(method), tally.means()


def taken_gradient(method: Method) -> Tensor:
    gradient = torch.cat([p.grad.flatten() for p in method.model.parameters() if p.grad is not None])
    method.model.zero_grad()
    return gradient


def logprobs(method: Method, sequence: Ids) -> Tensor:
    """log pi of each of the thought's tokens, the sequence by itself and its logits whole."""
    logits = method.model.lm(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
    t = range(sequence.thought.start, sequence.thought.stop)
    return torch.stack([logits[i - 1, sequence.ids[i]] for i in t])


def shake(policy: FakePolicy, by: float = 0.05) -> None:
    """Move the weights, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))
