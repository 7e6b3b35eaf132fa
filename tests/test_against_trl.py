"""Losses and gradients of one step against TRL's trainers, on the same weights and token ids.

Each trainer is really built, over a separate plain Hugging Face model; its collator pads the ids, and its own
`compute_loss` runs. Our losses come from the method's rollout, as a tree and padded. Both are float32: losses agree to
1e-5, gradients to 1e-5 of the largest element; sums in a different order differ by much less.

With equal options no definition differs: DPO's and the reward's margins and means over pairs, SFT's mean
over all completion tokens, GRPO's mean of means with `loss_type="grpo"` and `beta=0`. Optional parts of TRL (centred
rewards, DPO's other divergences and losses) have no counterpart here, and are off by default.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakePolicy
from judging import shake
from tiny import tiny_config, tiny_folder
from torch import Tensor

from dwrl_fast.data import Preference
from dwrl_fast.dialog import SingleTurn
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import Group
from dwrl_fast.objectives.group_relative import group_advantage
from dwrl_fast.templates import Template

trl = pytest.importorskip("trl")

PROMPTS = ["3 5 0 0 4", "5 6 2", "4 3 2 5 1", "1 1 2 6 0"]
ANSWERS = [("5", "2 7"), ("7 1 8", "2"), ("1", "8"), ("9 9 9 0", "0 1")]
BUDGETS = {"tree": 400, "padded": 50}  # tokens of a micro-batch: one of them, and several
MARGINS = [0.0, 1.5, 0.0, 0.25]
ROWS = [
    Preference(({"role": "user", "content": prompt},), answers, margin=margin)
    for prompt, answers, margin in zip(PROMPTS, ANSWERS, MARGINS, strict=True)
]
PLAIN = [Preference(row.prompt, row.responses) for row in ROWS]


def make(folder: Path, name: str, packing: str, dialog: SingleTurn | None = None) -> FakePolicy:
    tiny_folder(folder / "tiny")
    return FakePolicy(tiny_config(folder, method=name, packing=packing), dialog)


def ours(policy: FakePolicy, groups: list[Group]) -> tuple[float, dict[str, Tensor]]:
    loss, found, _ = policy.step(groups, budget=BUDGETS[policy.runtime.layout.packing])
    return loss, {name.removeprefix("lm."): gradient for name, gradient in found.items()}


def trainer_of(kind: str, policy: FakePolicy, folder: Path, data: dict[str, str], **options: Any) -> Any:
    """TRL's trainer over a copy of the method's model with Hugging Face's attention; `data` only lets it be built."""
    from datasets import Dataset

    labels = {"num_labels": 1} if policy.method.scalar else {}
    lm = type(policy.model.lm).from_pretrained(folder / "tiny", attn_implementation="eager", **labels)
    lm.config.pad_token_id = policy.dialog.pad_id
    lm.load_state_dict(policy.model.lm.state_dict())
    options = {"bf16": False, "use_cpu": True, "report_to": "none"} | options
    config = getattr(trl, f"{kind}Config")(output_dir=str(folder / "trl"), **options)
    extra = {"reward_funcs": lambda completions, **rest: [0.0] * len(completions)} if kind == "GRPO" else {}
    return getattr(trl, f"{kind}Trainer")(
        model=lm,
        args=config,
        train_dataset=Dataset.from_list([data] * 4),
        processing_class=policy.dialog.tokenizer,
        **extra,
    )


def theirs(trainer: Any, policy: FakePolicy, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.load_state_dict(policy.model.lm.state_dict())
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys() and max(g.abs().max() for g in one[1].values()) > 1e-3
    scale = max(g.abs().max().item() for g in other[1].values())
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-5, atol=1e-5 * scale)


def prompt_and_completion(group: Group, k: int) -> tuple[list[int], list[int]]:
    (sequence,) = group.sequences[k]
    return sequence.ids[: sequence.thought.start], sequence.ids[sequence.thought]


@pytest.mark.parametrize("rows", [PLAIN, ROWS], ids=["pairs", "margins"])
@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_bt(tmp_path: Path, rows: list[Preference], packing: str) -> None:
    """Both read rewards at the end-of-turn: TRL's model uses the last id that is not padding."""
    policy = make(tmp_path, "bt", packing)
    groups = policy.rollout(rows)[0]
    trainer = trainer_of("Reward", policy, tmp_path, {"chosen": "1", "rejected": "2"})
    examples: list[dict[str, Any]] = [
        {"chosen_ids": group.flat[0].ids, "rejected_ids": group.flat[1].ids} for group in groups
    ]
    if rows is ROWS:
        examples = [e | {"margin": row.margin} for e, row in zip(examples, rows, strict=True)]
    compare(ours(policy, groups), theirs(trainer, policy, trainer.data_collator(examples)))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_dpo(tmp_path: Path, packing: str) -> None:
    policy = make(tmp_path, "dpo", packing)
    groups = policy.rollout(PLAIN)[0]
    trainer = trainer_of("DPO", policy, tmp_path, {"prompt": "1", "chosen": "1", "rejected": "2"}, beta=0.22)
    shake(policy.model)
    examples = []
    for group in groups:
        (prompt, chosen), (same, rejected) = prompt_and_completion(group, 0), prompt_and_completion(group, 1)
        assert prompt == same
        examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    compare(ours(policy, groups), theirs(trainer, policy, trainer.data_collator(examples)))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_sft(tmp_path: Path, packing: str) -> None:
    policy = make(tmp_path, "sft", packing)
    groups = policy.rollout(PLAIN)[0]
    trainer = trainer_of("SFT", policy, tmp_path, {"prompt": "1", "completion": "1"})
    examples = []
    for group in groups:
        prompt, completion = prompt_and_completion(group, 0)
        examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    compare(ours(policy, groups), theirs(trainer, policy, trainer.data_collator(examples)))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_grpo(tmp_path: Path, packing: str) -> None:
    """Off-policy, so that the ratio of some tokens is clipped on both sides."""
    template = Template("compare {prompt} A {response_a} B {response_b}", labels=None, kind="pairwise")
    policy = make(tmp_path, "grpo-pair", packing, SingleTurn(make_tokenizer(), template, "correctness"))
    groups = policy.rollout(PLAIN)[0]
    g = torch.Generator().manual_seed(0)
    groups = [  # a random model writes no verdicts
        group.with_rewards([torch.rand(len(r), generator=g).tolist() for r in group.rewards]) for group in groups
    ]
    trainer = trainer_of(
        "GRPO", policy, tmp_path, {"prompt": "1"},
        loss_type="grpo", beta=0.0, epsilon=0.2, num_generations=3, per_device_train_batch_size=12, temperature=1.0,
    )  # fmt: skip
    shake(policy.model)
    advantage = torch.cat([group_advantage(torch.tensor(r)) for group in groups for r in group.rewards])
    inputs = grpo_inputs(groups, policy.dialog.pad_id) | {"advantages": advantage}
    with torch.no_grad():
        logits = policy.model.lm(torch.tensor([groups[0].flat[0].ids])).logits.log_softmax(-1)[0]
    ids, span = groups[0].flat[0].ids, groups[0].flat[0].thought
    ratio = torch.stack([logits[t - 1, ids[t]] for t in range(span.start, span.stop)])
    ratio = ratio - torch.tensor(groups[0].thoughts[0][0].logprobs)
    assert (ratio.exp() - 1).abs().max() > 0.2
    trainer.current_gradient_accumulation_steps = 1
    compare(ours(policy, groups), theirs(trainer, policy, inputs))


def grpo_inputs(groups: list[Group], pad_id: int) -> dict[str, Tensor]:
    """The inputs of TRL's rollout: prompts padded on the left, completions on the right."""
    sequences = [sequence for group in groups for sequence in group.flat]
    old = [thought.logprobs for group in groups for each in group.thoughts for thought in each]
    start = max(sequence.thought.start for sequence in sequences)
    stop = max(len(logprob) for logprob in old)
    rows: dict[str, list[list[float]]] = {}
    for sequence, logprob in zip(sequences, old, strict=True):
        prompt, completion = sequence.ids[: sequence.thought.start], sequence.ids[sequence.thought]
        before, after = start - len(prompt), stop - len(completion)
        made: dict[str, list[Any]] = {
            "prompt_ids": [pad_id] * before + prompt,
            "prompt_mask": [0] * before + [1] * len(prompt),
            "completion_ids": completion + [pad_id] * after,
            "completion_mask": [1] * len(completion) + [0] * after,
            "old_per_token_logps": logprob + [0.0] * after,
        }
        for name, row in made.items():
            rows.setdefault(name, []).append(row)
    return {name: torch.tensor(each) for name, each in rows.items()}
