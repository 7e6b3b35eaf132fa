"""Shared helpers for tests of methods that judge two responses in text: templates, policies, and the log-probs of a
single sequence.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fakes import FakePolicy
from tiny import tiny_config
from torch import Tensor

from dwrl_fast.dialog import SingleTurn, TokenSequence
from dwrl_fast.embedded.tokenizer import make_tokenizer
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
TEMPLATES = {"gram": DIRECT, "genrm": DIRECT, "pairrm": DIRECT, "grpo-point": POINTWISE}
A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"


def single_turn(template: Template) -> SingleTurn:
    return SingleTurn(make_tokenizer(), template, "correctness")


def make_policy(folder: Path, name: str, says: Callable[[str, int], str] | None = None, **changes: Any) -> FakePolicy:
    """A method with its template in TEMPLATES, or PAIRWISE; see FakePolicy."""
    config = tiny_config(folder, method=name, **changes)
    return FakePolicy(config, single_turn(TEMPLATES.get(name, PAIRWISE)), says)


def saved_model(folder: Path, name: str) -> Path:
    """A model as `train --method name` would save it after a few steps; `folder` holds the tiny one before them."""
    if name == "dwrl":
        return folder / "tiny"
    if not (folder / name).exists():
        asked = name == "judge" or name in TEMPLATES
        policy = make_policy(folder, name) if asked else FakePolicy(tiny_config(folder, method=name))
        shake(policy.model)
        save(folder / name, policy)
    return folder / name


def save(folder: Path, policy: FakePolicy) -> None:
    save_pretrained(folder, policy.model, policy.dialog, policy.method.card())


def taken_gradients(model: Any) -> dict[str, Tensor]:
    """The gradients by name; they are removed from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def logprobs(model: Any, sequence: TokenSequence) -> Tensor:
    """log pi of each trained token, for the sequence alone, from all its logits."""
    rows, span = model.lm(torch.tensor([sequence.ids])).logits[0].log_softmax(-1), sequence.thought
    return rows[span.start - 1 : span.stop - 1].gather(-1, torch.tensor(sequence.ids[span])[:, None])[:, 0]


def shake(model: Any, by: float = 0.05) -> None:
    """Change the trained weights, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator) * p.requires_grad)
